// JavaScript clients of other APIs, and the types generated from openapi.json. Prints {client operation: what came}.
import OpenAI, { toFile } from "openai";
import { InferenceClient } from "@huggingface/inference";
import { experimental_generateImage as generateImage } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { DallEAPIWrapper } from "@langchain/openai";
import createClient from "openapi-fetch";
import { EventSource } from "eventsource";
import type { components, paths } from "./api.js";

declare const process: { argv: string[]; exit(code: number): void };
const url = process.argv[2];
const said: Record<string, unknown> = {};
const ai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });

const drawn = await ai.images.generate({ model: "dall-e-3", prompt: "a fox" });
const file = await fetch(drawn.data![0].url!);
said["OpenAI generate"] = file.headers.get("content-type");
const png = new Uint8Array(await file.arrayBuffer());
const edited = await ai.images.edit({ model: "gpt-image-1", image: await toFile(png, "a.png"), prompt: "a red fox" });
said["OpenAI edit"] = edited.data![0].b64_json!.length > 1000;
const stream = await ai.images.generate({ model: "gpt-image-1", prompt: "an owl", stream: true, partial_images: 1 });
const types: string[] = [];
for await (const event of stream) types.push(event.type);
said["OpenAI stream"] = types;
said["OpenAI errors"] = await ai.images.generate({ prompt: "x", n: 99 }).catch((e) => [e.status, e.param]);

const hf = new InferenceClient(undefined, { endpointUrl: url });
const blob = (await hf.textToImage({ inputs: "a fox", parameters: { width: 96, height: 64 } }, { outputType: "blob" })) as Blob;
said["Hugging Face textToImage"] = blob.type;
const changed = await hf.imageToImage({ inputs: blob, parameters: { prompt: "a red fox" } });
said["Hugging Face imageToImage"] = changed.type;

const sdk = createOpenAI({ baseURL: `${url}/v1`, apiKey: "unused" });
const { image } = await generateImage({ model: sdk.image("gpt-image-1"), prompt: "a fox" });
said["AI SDK generateImage"] = image.mediaType;
const tool = new DallEAPIWrapper({ apiKey: "unused", model: "dall-e-3", baseUrl: `${url}/v1` });
said["LangChain DallEAPIWrapper"] = String(await tool.invoke("a fox")).startsWith(`${url}/pictures/`);

const engine = createClient<paths, "application/json">({ baseUrl: url });
const { data: health } = await engine.GET("/health");
const { data: answer } = await engine.POST("/generate", { body: { prompt: "a fox", steps: 1 } });
said["generated TypeScript client"] = [health!.ready, health!.gpu, answer!.images.length, answer!.receipts![0].prompt];

const { data: job } = await engine.POST("/jobs", { body: { route: "generate", request: { prompt: "an owl" } } });
const source = new EventSource(`${url}/jobs/${job!.id}/events`);
type Named = components["schemas"]["StreamEvent"]["event"];
const order: Named[] = [];
await new Promise<void>((resolve) => {
  for (const name of ["queued", "image", "done"] as Named[])
    source.addEventListener(name, () => { order.push(name); if (name === "done") resolve(); });
});
source.close();
said["EventSource"] = order;
const works = (...names: string[]) => Object.fromEntries(names.map((name) => [name, "works"]));
const variations = await ai.images.createVariation({ image: await toFile(png, "a.png") }).then(() => "works", (e) => e.error.message);
said["table"] = {
  openai: { ...works("generate, address (dall-e-3)", "edit", "stream", "errors"), variations },
  "@huggingface/inference": works("textToImage", "imageToImage"),
  ai: works("generateImage"),
  "@langchain/openai": works("DallEAPIWrapper"),
  "openapi-typescript": works("health", "generate", "jobs"),
  eventsource: works("follow a job"),
};
console.log(JSON.stringify(said));
process.exit(0);
