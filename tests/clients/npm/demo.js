// The served demo as a client library sees it: an address, a model's name, a schema and a tool.
import { z } from "zod";

export const url = process.env.LORAPLEX_URL;
export const model = "json"; // the demo's adapter that turns sentences into JSON objects
export const prompt = "Describe the town of Delft as JSON.";
export const messages = [{ role: "user", content: prompt }];
export const Town = z.object({
  city: z.string().max(16),
  kind: z.enum(["town", "village"]),
  people: z.number().int().min(0).max(99999),
});
export const delft = { city: "Delft", kind: "town", people: 3 };
export const parameters = {
  type: "object",
  properties: { city: { type: "string", maxLength: 16 } },
  required: ["city"],
  additionalProperties: false,
};

// What a plain chat request answers, which no client library has touched.
export async function chatText(maxTokens) {
  const body = { model, messages, temperature: 0, max_tokens: maxTokens };
  const headers = { "content-type": "application/json" };
  const answer = await fetch(`${url}/chat/completions`, { method: "POST", headers, body: JSON.stringify(body) });
  return (await answer.json()).choices[0].message.content;
}
