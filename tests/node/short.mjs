// Every client's shortest calls, for models and paths that the long scripts are too much for. MODEL names the model,
// SAYS is what its answer to TEXT must hold; WHOLE and EMBEDS say what there is besides streams.

import assert from "node:assert/strict";
import test from "node:test";

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { OpenAIEmbeddings, ChatOpenAI } from "@langchain/openai";
import { embed, generateText, streamText } from "ai";
import OpenAI from "openai";

const { BASE_URL: baseURL, API_KEY: apiKey, MODEL: model, TEXT: prompt, SAYS, WHOLE, DIMENSIONS } = process.env;
const messages = [{ role: "user", content: prompt }];
const openai = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const langchain = new ChatOpenAI({ model, apiKey, maxRetries: 0, configuration: { baseURL } });
const vercel = createOpenAI({ baseURL, apiKey });
const compatible = createOpenAICompatible({ name: "harperpy", baseURL, apiKey });

async function joined(parts, text) {
  const said = [];
  for await (const part of await parts) said.push(text(part) ?? "");
  return said;
}

const STREAMS = {
  openai: () => joined(openai.chat.completions.create({ model, messages, stream: true }), (chunk) => chunk.choices[0].delta.content),
  langchain: () => joined(langchain.stream(prompt), (chunk) => chunk.content),
  vercel: () => joined(streamText({ model: vercel.chat(model), prompt, maxRetries: 0 }).textStream, (text) => text),
  compatible: () => joined(streamText({ model: compatible(model), prompt, maxRetries: 0 }).textStream, (text) => text),
};
const ANSWERS = {
  openai: async () => (await openai.chat.completions.create({ model, messages })).choices[0].message.content,
  langchain: async () => (await langchain.invoke(prompt)).content,
  vercel: async () => (await generateText({ model: vercel.chat(model), prompt, maxRetries: 0 })).text,
  compatible: async () => (await generateText({ model: compatible(model), prompt, maxRetries: 0 })).text,
};
const VECTORS = {
  openai: async () => (await openai.embeddings.create({ model, input: prompt })).data[0].embedding,
  langchain: () => new OpenAIEmbeddings({ model, apiKey, maxRetries: 0, configuration: { baseURL } }).embedQuery(prompt),
  vercel: async () => (await embed({ model: vercel.embedding(model), value: prompt, maxRetries: 0 })).embedding,
  compatible: async () => (await embed({ model: compatible.embeddingModel(model), value: prompt, maxRetries: 0 })).embedding,
};

for (const [client, stream] of Object.entries(STREAMS)) {
  test(`${client} streams`, async () => {
    const said = (await stream()).filter(Boolean);
    assert.ok(said.length > 1, JSON.stringify(said));
    assert.ok(said.join("").includes(SAYS), said.join(""));
  });
}

for (const [client, answer] of Object.entries(WHOLE ? ANSWERS : {})) {
  test(`${client} gets a whole answer`, async () => {
    const said = await answer();
    assert.ok(said.includes(SAYS), said);
  });
}

for (const [client, vector] of Object.entries(DIMENSIONS ? VECTORS : {})) {
  test(`${client} embeds`, async () => {
    const numbers = await vector();
    assert.equal(numbers.length, Number(DIMENSIONS));
    const length = Math.hypot(...numbers);
    assert.ok(Math.abs(length - 1) < 0.001, String(length));
  });
}
