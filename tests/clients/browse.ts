// Clients in a web page of another origin. Bundled for the browser; the test calls what stands in `window.tries`.
import OpenAI from "openai";
import { InferenceClient } from "@huggingface/inference";

async function openai(url: string): Promise<unknown[]> {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0, dangerouslyAllowBrowser: true });
  const drawn = await client.images.generate({ model: "dall-e-3", prompt: "a fox" });
  const file = await (await fetch(drawn.data![0].url!)).blob();
  const edited = await client.images.edit({ model: "gpt-image-1", image: new File([file], "a.png", { type: file.type }), prompt: "a red fox" });
  const types: string[] = [];
  for await (const event of await client.images.generate({ model: "gpt-image-1", prompt: "an owl", stream: true, partial_images: 1 })) types.push(event.type);
  const wrong = await client.images.generate({ prompt: "x", n: 99 }).catch((e) => [e.status, e.param]);
  const models = (await client.models.list()).data.map((m) => m.id);
  return [file.type, edited.data![0].b64_json!.length > 1000, types, wrong, models];
}

async function huggingface(url: string): Promise<string> {
  const client = new InferenceClient(undefined, { endpointUrl: url });
  return ((await client.textToImage({ inputs: "a fox" }, { outputType: "blob" })) as Blob).type;
}

/** The browser's own EventSource: the ids of all events, and how often the connection was opened. */
async function events(url: string, through: string): Promise<unknown[]> {
  const ask = { route: "generate", request: { prompt: "an owl", steps: 30, n: 2 } };
  const posted = await fetch(`${url}/jobs`, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(ask) });
  const source = new EventSource(`${through}/jobs/${(await posted.json()).id}/events`);
  const ids: number[] = [];
  let opened = 0;
  source.addEventListener("open", () => { opened += 1; });
  await new Promise<void>((resolve) => {
    for (const name of ["queued", "step", "image", "done"])
      source.addEventListener(name, (event) => { ids.push(Number(event.lastEventId)); if (name === "done") resolve(); });
  });
  source.close();
  return [ids, opened];
}

/** Status of a POST with these headers; or what the browser says when it may not be read. */
async function post(url: string, headers: Record<string, string>): Promise<string> {
  const body = JSON.stringify({ prompt: "a fox", steps: 1 });
  return fetch(`${url}/generate`, { method: "POST", headers: { "content-type": "application/json", ...headers }, body }).then((r) => String(r.status), (e) => e.name);
}

Object.assign(window, { tries: { openai, huggingface, events, post } });
