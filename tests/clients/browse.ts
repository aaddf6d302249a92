// Clients in a web page of another origin. Bundled for the browser; the test calls what stands in `window.tries`.
import OpenAI from "openai";
import { InferenceClient } from "@huggingface/inference";

type Seen = Record<string, string>;

/** "works", what came instead of it, or what the page's user reads. */
async function outcome(attempt: () => Promise<unknown>): Promise<string> {
  return attempt().then(
    (came) => (came === true ? "works" : `not as asked: ${JSON.stringify(came)}`),
    (e) => String(e.error?.message ?? e.message).slice(0, 200),
  );
}

async function openai(url: string): Promise<Seen> {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0, dangerouslyAllowBrowser: true });
  let file = new Blob();
  const seen: Seen = {};
  seen["generate, address (dall-e-3)"] = await outcome(async () => {
    const drawn = await client.images.generate({ model: "dall-e-3", prompt: "a fox" });
    file = await (await fetch(drawn.data![0].url!)).blob();
    return file.type === "image/png";
  });
  seen["edit"] = await outcome(async () => {
    const edited = await client.images.edit({ image: new File([file], "a.png", { type: file.type }), prompt: "a red fox" });
    return edited.data![0].b64_json!.length > 1000;
  });
  seen["stream"] = await outcome(async () => {
    const types: string[] = [];
    for await (const event of await client.images.generate({ prompt: "an owl", stream: true, partial_images: 1 })) types.push(event.type);
    return types.join() === "image_generation.partial_image,image_generation.completed";
  });
  seen["errors"] = await outcome(async () =>
    client.images.generate({ prompt: "x", n: 99 }).then(() => false, (e) => e.status === 400 && e.param === "n"));
  seen["models"] = await outcome(async () => (await client.models.list()).data[0].id === "embedded");
  return seen;
}

async function huggingface(url: string): Promise<Seen> {
  const client = new InferenceClient(undefined, { endpointUrl: url });
  const seen: Seen = {};
  let fox = new Blob();
  seen["textToImage"] = await outcome(async () => {
    fox = (await client.textToImage({ inputs: "a fox" }, { outputType: "blob" })) as Blob;
    return fox.type === "image/png";
  });
  seen["imageToImage"] = await outcome(async () =>
    (await client.imageToImage({ inputs: fox, parameters: { prompt: "a red fox" } })).type === "image/png");
  return seen;
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
