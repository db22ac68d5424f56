// OpenAI's library for JavaScript: chat, parsed outputs, tools and responses.
import assert from "node:assert/strict";
import { test } from "node:test";

import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";

import { chatText, delft, messages, model, parameters, prompt, Town, url } from "./demo.js";

const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });

test("a streamed chat is the whole one", async () => {
  const asked = { model, messages, temperature: 0, max_tokens: 24 };
  const whole = await client.chat.completions.create(asked);
  let streamed = "";
  for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
    streamed += chunk.choices[0]?.delta.content ?? "";
  }

  assert.equal(streamed, whole.choices[0].message.content);
  assert.equal(streamed, await chatText(24));
});

test("a parsed chat is an object of its schema", async () => {
  const response_format = zodResponseFormat(Town, "town");
  const asked = { model, messages, temperature: 0, max_tokens: 200, response_format };

  assert.deepEqual((await client.chat.completions.parse(asked)).choices[0].message.parsed, delft);
  const final = await client.chat.completions.stream(asked).finalChatCompletion();
  assert.deepEqual(final.choices[0].message.parsed, delft);
});

test("a loop of tools calls its function and sends the result back", async () => {
  const cities = [];
  const weather = ({ city }) => {
    cities.push(city);
    return "sunny";
  };
  const tool = { name: "get_weather", parameters, parse: JSON.parse, function: weather, strict: true };
  const asked = { model, messages, temperature: 0, max_tokens: 60, tools: [{ type: "function", function: tool }] };
  const named = { type: "function", function: { name: "get_weather" } };

  const runner = client.chat.completions.runTools({ ...asked, tool_choice: named }, { maxChatCompletions: 2 });
  await runner.done();

  assert.equal(cities.length, 1);
  assert.ok(runner.messages.some((message) => message.role === "tool" && message.content === "sunny"));
});

test("a streamed response is the whole one", async () => {
  const text = { format: zodTextFormat(Town, "town") };
  const asked = { model, input: prompt, temperature: 0, max_output_tokens: 200, text };

  assert.deepEqual((await client.responses.parse(asked)).output_parsed, delft);
  const kinds = [];
  const stream = client.responses.stream(asked).on("event", (event) => kinds.push(event.type));
  assert.deepEqual((await stream.finalResponse()).output_parsed, delft);
  assert.equal(kinds.at(-1), "response.completed");
});
