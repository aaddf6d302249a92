// JavaScript clients of other APIs, and the types generated from openapi.json.
// Prints {client: {version, seen: {operation: "works", or what the client's user reads}}}: only what happened here.
import { readFileSync } from "node:fs";
import OpenAI, { toFile } from "openai";
import { InferenceClient } from "@huggingface/inference";
import { experimental_generateImage as generateImage } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { DallEAPIWrapper } from "@langchain/openai";
import createClient from "openapi-fetch";
import { EventSource } from "eventsource";
import type { components, paths } from "./api.js";

declare const process: { argv: string[]; exit(code: number): void };
const [url, locked] = process.argv.slice(2);
const rows: Record<string, { version: string; seen: Record<string, string> }> = {};

/** Makes a try, which says whether what came is what was asked for; what was seen becomes an entry of the client's row. */
async function tries(client: string, operation: string, attempt: () => Promise<unknown>): Promise<void> {
  const version = JSON.parse(readFileSync(`node_modules/${client}/package.json`, "utf8")).version;
  const said = await attempt().then(
    (came) => (came === true ? "works" : `not as asked: ${JSON.stringify(came)}`),
    (e) => String(e.error?.message ?? e.message).slice(0, 200),
  );
  (rows[`${client} (Node)`] ??= { version, seen: {} }).seen[operation] = said;
}

// openai
const ai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });
const drawn = await ai.images.generate({ model: "dall-e-3", prompt: "a fox" });
const answer = await fetch(drawn.data![0].url!);
const png = new Uint8Array(await answer.arrayBuffer());
const fox = () => toFile(png, "fox.png", { type: "image/png" });

await tries("openai", "generate", async () => (await ai.images.generate({ model: "gpt-image-1", prompt: "a fox", n: 2 })).data![1].b64_json!.length > 1000);
await tries("openai", "generate, address (dall-e-3)", async () => answer.headers.get("content-type") === "image/png");
await tries("openai", "edit", async () => (await ai.images.edit({ image: await fox(), prompt: "a red fox" })).data![0].b64_json!.length > 1000);
await tries("openai", "stream", async () => {
  const types: string[] = [];
  for await (const event of await ai.images.generate({ prompt: "an owl", stream: true, partial_images: 1 })) types.push(event.type);
  return types.join() === "image_generation.partial_image,image_generation.completed";
});
await tries("openai", "errors", async () =>
  ai.images.generate({ prompt: "x", n: 99 }).then(() => false, (e) => e.status === 400 && e.param === "n"));
await tries("openai", "variations", async () => ai.images.createVariation({ image: await fox() }));
await tries("openai", "models", async () => (await ai.models.list()).data[0].id === "embedded");
await tries("openai", "key", async () =>
  (await new OpenAI({ baseURL: `${locked}/v1`, apiKey: "sesame-7" }).images.generate({ prompt: "a fox" })).data!.length === 1);
await tries("openai", "no key", async () => new OpenAI({ baseURL: `${locked}/v1`, apiKey: "none" }).images.generate({ prompt: "a fox" }));

// Hugging Face, the AI SDK, LangChain
const hf = new InferenceClient(undefined, { endpointUrl: url });
const picture = new Blob([png], { type: "image/png" });
await tries("@huggingface/inference", "textToImage", async () =>
  ((await hf.textToImage({ inputs: "a fox", parameters: { width: 96, height: 64 } }, { outputType: "blob" })) as Blob).type === "image/png");
await tries("@huggingface/inference", "imageToImage", async () =>
  (await hf.imageToImage({ inputs: picture, parameters: { prompt: "a red fox" } })).type === "image/png");
const sdk = createOpenAI({ baseURL: `${url}/v1`, apiKey: "unused" });
await tries("ai", "generateImage", async () =>
  (await generateImage({ model: sdk.image("gpt-image-1"), prompt: "a fox", n: 2 })).images[1].mediaType === "image/png");
const tool = new DallEAPIWrapper({ apiKey: "unused", model: "dall-e-3", baseUrl: `${url}/v1` });
await tries("@langchain/openai", "DallEAPIWrapper", async () => String(await tool.invoke("a fox")).startsWith(`${url}/pictures/`));

// types generated from openapi.json
const engine = createClient<paths, "application/json" | "application/problem+json">({ baseUrl: url });
await tries("openapi-typescript", "health", async () => {
  const { data } = await engine.GET("/health");
  return data!.ready && !data!.gpu;
});
await tries("openapi-typescript", "generate", async () => {
  const { data } = await engine.POST("/generate", { body: { prompt: "a fox", steps: 1 } });
  return data!.images.length === 1 && data!.receipts![0].prompt === "a fox";
});
await tries("openapi-typescript", "errors", async () => {
  const { error } = await engine.POST("/generate", { body: { prompt: " " } });
  return error!.errors[0].loc === "prompt";
});

// the package `eventsource`, with events named by the generated types
type Named = components["schemas"]["StreamEvent"]["event"];
await tries("eventsource", "follow a job", async () => {
  const { data: job } = await engine.POST("/jobs", { body: { route: "generate", request: { prompt: "an owl" } } });
  const source = new EventSource(`${url}/jobs/${job!.id}/events`);
  const order: Named[] = [];
  await new Promise<void>((resolve) => {
    for (const name of ["queued", "image", "done"] as Named[])
      source.addEventListener(name, () => { order.push(name); if (name === "done") resolve(); });
  });
  source.close();
  return order.join() === "queued,image,done";
});

console.log(JSON.stringify(rows));
process.exit(0);
