// What the scripts share: where the server is, who asks, and what the provider behind it answers (tests/provider.py).

import assert from "node:assert/strict";

export const { BASE_URL: baseURL, API_KEY: apiKey, FORBIDDEN_KEY: forbiddenKey } = process.env;
export const expectedVector = JSON.parse(process.env.VECTOR); // of SEA
export const model = "gpt-4o-mini";
export const embedder = "text-embedding-3-small";
export const SEA = "the sea";

export const user = (content) => [{ role: "user", content }];

// What goes wrong: what is asked, as whom, and the status, code and param that come back.
const NO_PARAM = { param: null };
export const failures = [
  { status: 400, code: "failed_400", param: "messages" },
  { status: 404, code: "failed_404", param: "messages" },
  { status: 409, code: "failed_409", param: "messages" },
  { status: 422, code: "failed_422", param: "messages" },
  { status: 429, code: "failed_429", ...NO_PARAM, retryAfter: "7" },
  { status: 500, code: null, ...NO_PARAM },
  { status: 502, code: null, ...NO_PARAM },
  { status: 503, code: null, ...NO_PARAM, retryAfter: "7" },
  { name: "a refused value", text: "hello", temperature: 3, status: 400, param: "temperature" },
  { name: "a wrong key", text: "hello", key: "hk_wrong", status: 401, code: "invalid_api_key", ...NO_PARAM },
  { name: "a user who may not", text: "hello", key: forbiddenKey, status: 403, code: "insufficient_permissions", ...NO_PARAM },
  { name: "an unknown model", text: "hello", model: "no-such-model", status: 404, code: "model_not_found" },
  { name: "a key of ours that the provider refuses", text: "fail 401", status: 502, code: "upstream_auth_error", ...NO_PARAM },
  { name: "a provider that says nothing", text: "silence", model: "impatient", status: 504, code: "timeout", ...NO_PARAM },
].map((failure) => ({ name: `a provider's ${failure.status}`, text: `fail ${failure.status}`, model, key: apiKey, ...failure }));

// `told` is what a client makes of the answer: status, code, param, message, retryAfter.
export function assertFailure(told, failure) {
  const { status, code, param, retryAfter } = failure;
  assert.equal(told.status, status);
  if (code !== undefined) assert.equal(told.code, code);
  if (param !== undefined) assert.equal(told.param ?? null, param);
  if (retryAfter !== undefined) assert.equal(told.retryAfter, retryAfter);
  assert.ok(told.message.length > 0);
}

export async function failureOf(action) {
  try {
    await action();
  } catch (error) {
    return error;
  }
  assert.fail("nothing was thrown");
}
