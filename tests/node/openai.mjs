// OpenAI's own client for Node.

import assert from "node:assert/strict";
import test from "node:test";

import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

import { apiKey, assertFailure, baseURL, embedder, expectedVector, failureOf, failures, model, SEA, user } from "./common.mjs";

const connect = (key = apiKey) => new OpenAI({ baseURL, apiKey: key, maxRetries: 0 });
const client = connect();
const chat = client.chat.completions;
const numbers = z.object({ a: z.number(), b: z.number() });
const add = { type: "function", function: { name: "add", parameters: z.toJSONSchema(numbers) } };

const CLASSES = {
  400: OpenAI.BadRequestError,
  401: OpenAI.AuthenticationError,
  403: OpenAI.PermissionDeniedError,
  404: OpenAI.NotFoundError,
  409: OpenAI.ConflictError,
  422: OpenAI.UnprocessableEntityError,
  429: OpenAI.RateLimitError,
};

test("a whole answer", async () => {
  const answer = await chat.create({ model, messages: user("hello there") });
  const [choice] = answer.choices;
  assert.equal(choice.message.content, "You said: hello there");
  assert.equal(choice.message.role, "assistant");
  assert.equal(choice.message.refusal, null);
  assert.equal(choice.finish_reason, "stop");
  assert.equal(answer.object, "chat.completion");
  assert.equal(answer.model, model);
  assert.match(answer.id, /^chatcmpl-/);
  assert.deepEqual([answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens], [2, 4, 6]);
});

test("several choices", async () => {
  const { choices } = await chat.create({ model, messages: user("hello"), n: 2 });
  assert.deepEqual(choices.map((choice) => [choice.index, choice.message.content]), [[0, "You said: hello"], [1, "You said: hello"]]);
});

test("several choices, streamed side by side", async () => {
  const said = ["", ""];
  const options = { n: 2, stream: true, stream_options: { include_usage: true } };
  for await (const { choices } of await chat.create({ model, messages: user("hello"), ...options })) {
    for (const { index, delta } of choices) said[index] += delta.content ?? "";
  }
  assert.deepEqual(said, ["You said: hello", "You said: hello"]);
});

test("a stream, with its usage last", async () => {
  const chunks = [];
  const options = { stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await chat.create({ model, messages: user("hello there"), ...options })) chunks.push(chunk);
  const deltas = chunks.flatMap((chunk) => chunk.choices.map((choice) => choice.delta));
  assert.equal(deltas[0].role, "assistant");
  assert.deepEqual(deltas.map((delta) => delta.content).filter(Boolean), ["You", " said:", " hello", " there"]);
  assert.equal(chunks.at(-2).choices[0].finish_reason, "stop");
  assert.deepEqual(chunks.at(-1).choices, []);
  assert.equal(chunks.at(-1).usage.total_tokens, 6);
  assert.equal(new Set(chunks.map((chunk) => chunk.id)).size, 1);
});

test("the stream helper", async () => {
  const stream = chat.stream({ model, messages: user("hello there") });
  let seen = "";
  stream.on("content", (delta) => (seen += delta));
  const final = await stream.finalChatCompletion();
  assert.equal(seen, "You said: hello there");
  assert.equal(final.choices[0].message.content, seen);
});

for (const stream of [false, true]) {
  test(`tools round trip, ${stream ? "streamed" : "whole"}`, async () => {
    const summed = [];
    const tool = zodFunction({
      name: "add",
      parameters: numbers,
      function: ({ a, b }) => {
        summed.push([a, b]);
        return String(a + b);
      },
    });
    const runner = chat.runTools({ model, messages: user("add 3 and 4"), tools: [tool], stream });
    assert.equal(await runner.finalContent(), "The tool says: 7");
    assert.deepEqual(summed, [[3, 4]]);
  });
}

test("two tool calls at once, answered by hand", async () => {
  const messages = user("add 3 and 4 twice");
  const first = await chat.create({ model, messages, tools: [add], tool_choice: "required", parallel_tool_calls: true });
  assert.equal(first.choices[0].finish_reason, "tool_calls");
  assert.equal(first.choices[0].message.content, null);
  const calls = first.choices[0].message.tool_calls;
  assert.deepEqual(calls.map((call) => [call.type, call.function.name]), [["function", "add"], ["function", "add"]]);
  assert.notEqual(calls[0].id, calls[1].id);
  const results = calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: JSON.stringify(JSON.parse(call.function.arguments)) }));
  const second = await chat.create({ model, messages: [...messages, first.choices[0].message, ...results], tools: [add] });
  assert.equal(second.choices[0].message.content, 'The tool says: {"a":3,"b":4}');
});

test("streamed tool calls come in pieces", async () => {
  const calls = [];
  let reason;
  const stream = await chat.create({ model, messages: user("add 3 and 4 twice"), tools: [add], stream: true });
  for await (const { choices } of stream) {
    for (const call of choices[0].delta.tool_calls ?? []) {
      const known = (calls[call.index] ??= { ids: [], names: [], pieces: [] });
      if (call.id) known.ids.push(call.id);
      if (call.function?.name) known.names.push(call.function.name);
      if (call.function?.arguments) known.pieces.push(call.function.arguments);
    }
    reason = choices[0].finish_reason ?? reason;
  }
  assert.equal(reason, "tool_calls");
  assert.equal(calls.length, 2);
  for (const { ids, names, pieces } of calls) {
    assert.equal(ids.length, 1);
    assert.deepEqual(names, ["add"]);
    assert.ok(pieces.length > 2);
    assert.deepEqual(JSON.parse(pieces.join("")), { a: 3, b: 4 });
  }
});

test("structured output, parsed", async () => {
  const person = z.object({ name: z.string(), age: z.number(), mood: z.enum(["glad", "sad"]) });
  const wanted = { model, messages: user("Ada is 36"), response_format: zodResponseFormat(person, "person") };
  const expected = { name: "text", age: 36, mood: "glad" };
  assert.deepEqual((await chat.parse(wanted)).choices[0].message.parsed, expected);
  assert.deepEqual((await chat.stream(wanted).finalChatCompletion()).choices[0].message.parsed, expected);
});

test("embeddings are the provider's floats, however they travel", async () => {
  const embed = async (more) => (await client.embeddings.create({ model: embedder, input: [SEA, "the ocean"], ...more })).data;
  const unasked = await embed({});
  assert.deepEqual(unasked[0].embedding, expectedVector);
  assert.deepEqual(unasked, await embed({ encoding_format: "float" }));
  const packed = Buffer.from((await embed({ encoding_format: "base64" }))[0].embedding, "base64");
  assert.deepEqual([...new Float32Array(new Uint8Array(packed).buffer)], expectedVector);
});

test("models, listed and one by one", async () => {
  const listed = [];
  for await (const each of client.models.list()) listed.push(each);
  assert.ok(listed.some((each) => each.id === model));
  const one = await client.models.retrieve(model);
  assert.deepEqual(one, listed.find((each) => each.id === model));
  assert.equal(one.object, "model");
  const error = await failureOf(() => client.models.retrieve("no-such-model"));
  assert.ok(error instanceof OpenAI.NotFoundError);
  assert.equal(error.code, "model_not_found");
});

for (const failure of failures) {
  for (const stream of [false, true]) {
    test(`${failure.name}, ${stream ? "streamed" : "whole"}`, async () => {
      const body = { model: failure.model, messages: user(failure.text), temperature: failure.temperature, stream };
      const error = await failureOf(() => connect(failure.key).chat.completions.create(body));
      assert.ok(error instanceof (CLASSES[failure.status] ?? OpenAI.InternalServerError), String(error));
      const { status, code, param, message } = error;
      assertFailure({ status, code, param, message, retryAfter: error.headers.get("retry-after") }, failure);
      assert.ok(error.requestID);
    });
  }
}

for (const text of ["fail midway", "cut midway"]) {
  test(`a stream that breaks raises: ${text}`, async () => {
    let seen = "";
    const error = await failureOf(async () => {
      for await (const chunk of await chat.create({ model, messages: user(text), stream: true })) {
        seen += chunk.choices[0].delta.content ?? "";
      }
    });
    assert.equal(seen, "Once upon ");
    assert.ok(error instanceof OpenAI.APIError, String(error));
  });
}

test("a stream that is aborted", async () => {
  const stream = await chat.create({ model, messages: user("hang"), stream: true });
  let seen = "";
  for await (const chunk of stream) {
    seen += chunk.choices[0].delta.content ?? "";
    if (seen === "Once upon ") stream.controller.abort();
  }
  assert.equal(seen, "Once upon ");
});

test("twenty calls at once", async () => {
  const texts = Array.from({ length: 20 }, (_, at) => `number ${at}`);
  const answers = await Promise.all(
    texts.map(async (text, at) => {
      if (at % 2) return chat.stream({ model, messages: user(text) }).finalContent();
      return (await chat.create({ model, messages: user(text) })).choices[0].message.content;
    }),
  );
  assert.deepEqual(answers, texts.map((text) => `You said: ${text}`));
});
