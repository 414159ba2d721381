// LangChain.js.

import assert from "node:assert/strict";
import test from "node:test";

import { HumanMessage, ToolMessage } from "@langchain/core/messages";
import { tool } from "@langchain/core/tools";
import { ChatOpenAI, OpenAIEmbeddings } from "@langchain/openai";
import { z } from "zod";

import { apiKey, assertFailure, baseURL, embedder, expectedVector, failureOf, failures, model, SEA } from "./common.mjs";

const connect = (more = {}) => new ChatOpenAI({ model, apiKey, maxRetries: 0, configuration: { baseURL }, ...more });
const chat = connect();
const numbers = z.object({ a: z.number(), b: z.number() });
const add = tool(({ a, b }) => String(a + b), { name: "add", description: "Adds two numbers.", schema: numbers });

async function gather(stream) {
  const chunks = [];
  for await (const chunk of await stream) chunks.push(chunk);
  return { chunks, whole: chunks.reduce((all, chunk) => all.concat(chunk)) };
}

test("a whole answer", async () => {
  const answer = await chat.invoke("hello there");
  assert.equal(answer.content, "You said: hello there");
  assert.deepEqual([answer.usage_metadata.input_tokens, answer.usage_metadata.output_tokens, answer.usage_metadata.total_tokens], [2, 4, 6]);
  assert.equal(answer.response_metadata.finish_reason, "stop");
  assert.match(answer.id, /^chatcmpl-/);
});

test("a stream, with its usage", async () => {
  const { chunks, whole } = await gather(chat.stream("hello there"));
  assert.deepEqual(chunks.map((chunk) => chunk.content).filter(Boolean), ["You", " said:", " hello", " there"]);
  assert.equal(whole.usage_metadata.total_tokens, 6);
  assert.equal(whole.response_metadata.finish_reason, "stop");
});

test("tools round trip", async () => {
  const able = chat.bindTools([add]);
  const question = new HumanMessage("add 3 and 4");
  const first = await able.invoke([question]);
  assert.deepEqual(first.tool_calls.map(({ name, args }) => ({ name, args })), [{ name: "add", args: { a: 3, b: 4 } }]);
  const result = await add.invoke(first.tool_calls[0]);
  assert.ok(result instanceof ToolMessage);
  const second = await able.invoke([question, first, result]);
  assert.equal(second.content, "The tool says: 7");
  assert.deepEqual(second.tool_calls, []);
});

test("streamed tool calls come in pieces", async () => {
  const { chunks, whole } = await gather(chat.bindTools([add], { tool_choice: "add" }).stream("add 3 and 4 twice"));
  const pieces = chunks.flatMap((chunk) => chunk.tool_call_chunks ?? []).filter((piece) => piece.args);
  assert.ok(pieces.length > 4);
  assert.deepEqual(whole.tool_calls.map((call) => call.args), [{ a: 3, b: 4 }, { a: 3, b: 4 }]);
  assert.equal(new Set(whole.tool_calls.map((call) => call.id)).size, 2);
});

for (const method of ["jsonSchema", "functionCalling", "jsonMode"]) {
  test(`structured output by ${method}`, async () => {
    const schema = method === "jsonMode" ? z.object({ answer: z.string() }) : z.object({ name: z.string(), age: z.number() });
    const answer = await chat.withStructuredOutput(schema, { method, name: "person" }).invoke("Ada is 36");
    assert.deepEqual(answer, method === "jsonMode" ? { answer: "Ada is 36" } : { name: "text", age: 36 });
  });
}

test("structured output, streamed", async () => {
  const schema = z.object({ name: z.string(), age: z.number() });
  let last;
  for await (const part of await chat.withStructuredOutput(schema, { method: "jsonSchema" }).stream("Ada is 36")) last = part;
  assert.deepEqual(last, { name: "text", age: 36 });
});

for (const encodingFormat of [undefined, "float"]) {
  test(`embeddings are the provider's floats, asked for as ${encodingFormat}`, async () => {
    const embeddings = new OpenAIEmbeddings({ model: embedder, apiKey, encodingFormat, maxRetries: 0, configuration: { baseURL } });
    assert.deepEqual(await embeddings.embedQuery(SEA), expectedVector);
    const both = await embeddings.embedDocuments(["the ocean", SEA]);
    assert.deepEqual([both.length, both[1]], [2, expectedVector]);
  });
}

for (const { name, text, key, ...failure } of failures) {
  for (const stream of [false, true]) {
    test(`${name}, ${stream ? "streamed" : "whole"}`, async () => {
      const asked = connect({ model: failure.model, apiKey: key, temperature: failure.temperature });
      const error = await failureOf(() => (stream ? gather(asked.stream(text)) : asked.invoke(text)));
      const { status, code, param, message } = error;
      assertFailure({ status, code, param, message, retryAfter: error.headers?.get("retry-after") }, failure);
    });
  }
}

for (const text of ["fail midway", "cut midway"]) {
  test(`a stream that breaks raises: ${text}`, async () => {
    let seen = "";
    await failureOf(async () => {
      for await (const chunk of await chat.stream(text)) seen += chunk.content;
    });
    assert.equal(seen, "Once upon ");
  });
}

test("a stream that is aborted", async () => {
  const controller = new AbortController();
  let seen = "";
  const error = await failureOf(async () => {
    for await (const chunk of await chat.stream("hang", { signal: controller.signal })) {
      seen += chunk.content;
      if (seen === "Once upon ") controller.abort();
    }
  });
  assert.equal(seen, "Once upon ");
  assert.match(`${error.name} ${error.message}`, /abort/i);
});

test("twenty calls at once", async () => {
  const texts = Array.from({ length: 20 }, (_, at) => `number ${at}`);
  const answers = await chat.batch(texts);
  assert.deepEqual(answers.map((answer) => answer.content), texts.map((text) => `You said: ${text}`));
});
