// The Vercel AI SDK, by way of the provider package that PROVIDER names.

import assert from "node:assert/strict";
import test from "node:test";

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, embed, embedMany, generateObject, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

import { apiKey, assertFailure, baseURL, embedder, expectedVector, failureOf, failures, model, SEA } from "./common.mjs";

const providers = {
  openai: (key) => createOpenAI({ baseURL, apiKey: key }),
  compatible: (key) => createOpenAICompatible({ name: "harperpy", baseURL, apiKey: key, includeUsage: true, supportsStructuredOutputs: true }),
};
const connect = (key = apiKey) => providers[process.env.PROVIDER](key);
const chat = (name = model, key = apiKey) => (connect(key).chat ?? connect(key).chatModel)(name);
const common = { model: chat(), maxRetries: 0 };
const silent = { onError() {} };
const add = tool({
  description: "Adds two numbers.",
  inputSchema: z.object({ a: z.number(), b: z.number() }),
  execute: async ({ a, b }) => String(a + b),
});
const person = z.object({ name: z.string(), age: z.number() });

async function partsOf(result) {
  const parts = [];
  for await (const part of result.fullStream) parts.push(part);
  return parts;
}

async function streamed(options) {
  const parts = await partsOf(streamText({ ...common, ...silent, ...options }));
  const failed = parts.find((part) => part.type === "error");
  if (failed) throw failed.error;
  return parts;
}

test("a whole answer", async () => {
  const answer = await generateText({ ...common, prompt: "hello there" });
  assert.equal(answer.text, "You said: hello there");
  assert.equal(answer.finishReason, "stop");
  assert.deepEqual([answer.usage.inputTokens, answer.usage.outputTokens, answer.usage.totalTokens], [2, 4, 6]);
  assert.match(answer.response.id, /^chatcmpl-/);
  assert.equal(answer.response.modelId, model);
});

test("a stream, with its usage", async () => {
  const result = streamText({ ...common, ...silent, prompt: "hello there" });
  const parts = await partsOf(result);
  assert.equal(parts.filter((part) => part.type === "text-delta").map((part) => part.text).join("|"), "You| said:| hello| there");
  assert.equal(await result.finishReason, "stop");
  assert.equal((await result.usage).totalTokens, 6);
});

test("tools round trip, whole", async () => {
  const answer = await generateText({ ...common, prompt: "add 3 and 4", tools: { add }, stopWhen: stepCountIs(3) });
  assert.equal(answer.text, "The tool says: 7");
  assert.deepEqual(answer.steps.map((step) => step.finishReason), ["tool-calls", "stop"]);
  assert.deepEqual(answer.steps[0].toolCalls.map((call) => call.input), [{ a: 3, b: 4 }]);
});

test("tools round trip, streamed, with the calls in pieces", async () => {
  const parts = await streamed({ prompt: "add 3 and 4 twice", tools: { add }, stopWhen: stepCountIs(3) });
  const of = (type) => parts.filter((part) => part.type === type);
  assert.ok(of("tool-input-delta").length > 4);
  assert.deepEqual(of("tool-call").map((part) => [part.toolName, part.input]), [["add", { a: 3, b: 4 }], ["add", { a: 3, b: 4 }]]);
  assert.equal(new Set(of("tool-call").map((part) => part.toolCallId)).size, 2);
  assert.equal(of("text-delta").map((part) => part.text).join(""), "The tool says: 7");
  assert.deepEqual(of("finish-step").map((part) => part.finishReason), ["tool-calls", "stop"]);
});

test("structured output, whole and streamed", async () => {
  const expected = { name: "text", age: 36 };
  const asked = { ...common, prompt: "Ada is 36", output: Output.object({ schema: person }) };
  assert.deepEqual((await generateText(asked)).output, expected);
  assert.deepEqual(await streamText(asked).output, expected);
  assert.deepEqual((await generateObject({ ...common, prompt: "Ada is 36", schema: person })).object, expected);
});

test("embeddings are the provider's floats", async () => {
  const provider = connect();
  const embedding = (provider.embedding ?? provider.embeddingModel)(embedder);
  assert.deepEqual((await embed({ model: embedding, value: SEA, maxRetries: 0 })).embedding, expectedVector);
  const both = await embedMany({ model: embedding, values: ["the ocean", SEA], maxRetries: 0 });
  assert.deepEqual([both.embeddings.length, both.embeddings[1], both.usage.tokens], [2, expectedVector, 4]);
});

for (const { name, text, key, ...failure } of failures) {
  for (const stream of [false, true]) {
    test(`${name}, ${stream ? "streamed" : "whole"}`, async () => {
      const options = { ...common, model: chat(failure.model, key), prompt: text, temperature: failure.temperature };
      const error = await failureOf(() => (stream ? streamed(options) : generateText(options)));
      assert.ok(APICallError.isInstance(error), String(error));
      const { code, param } = JSON.parse(error.responseBody).error;
      const { statusCode, message, responseHeaders } = error;
      assertFailure({ status: statusCode, code, param, message, retryAfter: responseHeaders["retry-after"] }, failure);
      assert.equal(message, JSON.parse(error.responseBody).error.message);
      assert.equal(error.isRetryable, [408, 409, 429].includes(statusCode) || statusCode >= 500);
    });
  }
}

for (const text of ["fail midway", "cut midway"]) {
  test(`a stream that breaks raises: ${text}`, async () => {
    const parts = await partsOf(streamText({ ...common, ...silent, prompt: text }));
    assert.equal(parts.filter((part) => part.type === "text-delta").map((part) => part.text).join(""), "Once upon ");
    assert.equal(parts.filter((part) => part.type === "error").length, 1);
    assert.equal(parts.find((part) => part.type === "finish").finishReason, "error");
  });
}

test("a stream that is aborted", async () => {
  const controller = new AbortController();
  const types = [];
  let seen = "";
  for await (const part of streamText({ ...common, ...silent, prompt: "hang", abortSignal: controller.signal }).fullStream) {
    types.push(part.type);
    seen += part.type === "text-delta" ? part.text : "";
    if (seen === "Once upon ") controller.abort();
  }
  assert.equal(seen, "Once upon ");
  assert.equal(types.at(-1), "abort");
});

test("twenty calls at once", async () => {
  const texts = Array.from({ length: 20 }, (_, at) => `number ${at}`);
  const answers = await Promise.all(
    texts.map(async (prompt, at) => (at % 2 ? streamText({ ...common, prompt }).text : (await generateText({ ...common, prompt })).text)),
  );
  assert.deepEqual(answers, texts.map((text) => `You said: ${text}`));
});
