// The AI SDK: text, objects and tools, through chat and through responses.
import assert from "node:assert/strict";
import { test } from "node:test";

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, isStepCount, jsonSchema, Output, streamObject, streamText, tool } from "ai";

import { chatText, delft, model as name, parameters, prompt, Town, url } from "./demo.js";

const chat = createOpenAICompatible({ name: "loraplex", baseURL: url, supportsStructuredOutputs: true });
const responses = createOpenAI({ baseURL: url, apiKey: "none" });
const models = { chat: chat(name), responses: responses.responses(name) };

for (const [way, model] of Object.entries(models)) {
  const asked = { model, prompt, temperature: 0, maxRetries: 0 };

  test(`${way}: a streamed text is the whole one`, async () => {
    const whole = (await generateText({ ...asked, maxOutputTokens: 24 })).text;
    let streamed = "";
    for await (const part of streamText({ ...asked, maxOutputTokens: 24 }).textStream) streamed += part;

    assert.equal(streamed, whole);
    assert.equal(streamed, await chatText(24));
  });

  test(`${way}: an object is as its schema says, whole, streamed and as an output of text`, async () => {
    const limited = { ...asked, maxOutputTokens: 200 };

    assert.deepEqual((await generateObject({ ...limited, schema: Town })).object, delft);
    const stream = streamObject({ ...limited, schema: Town });
    let last;
    for await (const partial of stream.partialObjectStream) last = partial;
    assert.deepEqual(last, delft);
    assert.deepEqual(await stream.object, delft);
    const output = Output.object({ schema: Town });
    assert.deepEqual((await generateText({ ...limited, output })).output, delft);
  });

  test(`${way}: a required tool runs and the model answers to its result`, async () => {
    const cities = [];
    const execute = async ({ city }) => {
      cities.push(city);
      return "sunny";
    };
    const tools = { weather: tool({ description: "Weather.", inputSchema: jsonSchema(parameters), execute }) };
    const prepareStep = ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" });

    const result = await generateText({ ...asked, maxOutputTokens: 60, tools, prepareStep, stopWhen: isStepCount(2) });

    assert.equal(cities.length, 1);
    assert.equal(result.steps.length, 2);
    assert.ok(result.text);
  });
}
