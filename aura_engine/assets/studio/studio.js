// The Studio: one module, two hosts. On the page it talks to engines over HTTP, in a notebook to the kernel.
// There is no build step: what the browser loads is what you read. In order: texts, helpers, requests and receipts,
// engines, what is kept, the state, the view, the hosts. No text ever becomes markup.

// ---------------------------------------------------------------- texts: the one table a translation replaces
export const TEXTS = {
  prompt: "What should it be?", become: "What should it become?", example: "a fox on a green background",
  generate: "Generate", stop: "Stop", surprise: "Surprise me", addPicture: "Start from a picture of yours",
  settings: "Settings", shape: "Shape", count: "Pictures", seed: "Seed", random: "random", dice: "Draw a seed",
  steps: "Steps", guidance: "Guidance", temperature: "Temperature", strength: "Strength", negative: "Without",
  negativeOff: "acts with guidance above 1", lora: "Style (LoRA)", none: "none", size: "Size", standard: "standard",
  high: "large", own: "Back to the model's own", someSteps: "{n} steps", again: "Again", start: "Start from it",
  compare: "Compare", save: "Save", star: "Keep", remove: "Delete", pictures: "Pictures", clear: "Clear all",
  stage: "Picture", receipt: "Receipt", use: "Use these settings", useSeed: "Use this seed", copy: "Copy", link: "link", curl: "curl",
  python: "Python", json: "JSON", copied: "Copied.", copyThis: "Copy this:", time: "time", seconds: "{n} s",
  sampler: "sampler", model: "model", notes: "notes", empty: "Describe something and press Generate.",
  emptyHint: "Each picture keeps its receipt: how it was made, ready to be used again.", yours: "your picture",
  ready: "ready", work: "{n} in work", loading: "loading", failed: "not working", draining: "stopping",
  away: "not reachable", asleep: "asleep", connecting: "connecting", ended: "kernel ended", on: "{model} on {device}",
  waitLoading: "The model is loading. Your picture starts by itself.",
  waitBusy: "The engine is busy. Asking again in {n} s.", waitAway: "No answer. Trying again in {n} s.",
  waitAsleep: "The engine is waking up. Asking again in {n} s.", waitNext: "Asking the other engine.",
  waitKernel: "The kernel is busy with a cell; your picture is next.", asking: "asking …",
  queued: "{position} ahead of you, about {n} s", soon: "about {n} s", step: "step {step} of {steps}",
  finishing: "finishing …", stopped: "Stopped.", done: "Done.", resumed: "Went on while you were away.",
  notReached: "The engine cannot be reached. It may be restarting; the Studio keeps trying.",
  cloudNotReached: "The cloud engine cannot be reached. If it runs, its ALLOW_ORIGINS must contain {origin}.",
  notOurs: "The address answered {status}, but not as an engine.", broken: "Something went wrong here: {why}",
  modelFailed: "The model could not be loaded. {why}", lost: "The picture it started from is not here any more.",
  kernelEnded: "The kernel ended. Run the cell again; the pictures here can still be saved.",
  keyMissing: "This engine asks for its key.", keyWrong: "That is not this engine's key.", key: "Key", useKey: "Use key",
  seedWrong: "The seed is a whole number from 0 to 9007199254740991, or empty for a random one.",
  noPrompt: "Say first what it should be.", close: "Close", undo: "Undo", removed: "Deleted.",
  cleared: "All pictures are deleted.", retry: "Try again", notPicture: "That is not a PNG, JPEG or WebP picture.",
  offer: "This picture carries its receipt.", shared: "A picture was shared with you: “{prompt}”", makeIt: "Make it",
  drop: "Drop the picture to start from it", badLink: "This link does not hold a picture.",
  full: "The oldest pictures were let go to make room; kept ones stay.", takeOff: "Take the picture off",
  making: "in work: {prompt}", vary: "Vary", over: "over", and: "and", words: "Words", make: "Make {n}",
  axisWrong: "{axis}: up to 8 values within {allowed}, with commas between them.", wordsHint: "one | another",
  grid: "{prompt} · seed {seed}", made: "{n} of {of}", engine: "Engine", which: "Which engine", local: "Local",
  cloud: "Cloud", auto: "Auto", address: "Address of the cloud engine", noCloud: "Enter the cloud engine's address.",
  status: "status", precision: "precision", scheduler: "scheduler", optimizations: "optimizations", memory: "memory",
  queue: "queue", queueIs: "{length} pictures, {seconds} s", warnings: "warnings", reason: "reason", version: "version",
  advice: "what to do", url: "where", stepCost: "Milliseconds of a step, by pictures in it", gib: "{n} GiB",
  gpuGib: "{n} GiB on the GPU", device: "device", loras: "LoRAs", lately: "last pictures", fetching: "fetching {file}",
  bytes: "{done} of {total} GB", keys: "Keys: Ctrl+Enter generate · Esc stop · / prompt · V again · E start from it · "
    + "C compare · R use settings · S save · F keep · Delete · arrows choose",
};

let texts = TEXTS;
const number = (n, maximumFractionDigits = 2) => (
  new Intl.NumberFormat(undefined, { maximumFractionDigits, useGrouping: false }).format(n));
const t = (key, slots = {}) => (texts[key] ?? key).replace(/\{(\w+)\}/g, (_, name) => {
  const value = slots[name] ?? "";
  return typeof value === "number" ? number(value) : value;
});

// ---------------------------------------------------------------- helpers
const newSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];
const newId = () => `${Date.now().toString(36)}-${newSeed().toString(36)}`;
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const whole = (seconds) => Math.max(1, Math.ceil(seconds));
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const last = (path) => String(path).split("/").pop();

function sleep(seconds, signal) {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    const timer = setTimeout(resolve, 1000 * seconds);
    signal?.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
  });
}

/** What went wrong: `code` for the program, the message for people, `fields` [{loc}] for the form. */
export class Trouble extends Error {
  constructor(code, message, { status = 0, fields = [], retryAfter = 0 } = {}) {
    super(message);
    Object.assign(this, { code, status, fields, retryAfter });
  }

  static from({ type = "", detail, title, status, errors = [] }, retryAfter = 0) {
    return new Trouble(type.replace("urn:aura:", ""), detail ?? title, { status, fields: errors, retryAfter });
  }

  static of(field, key, slots) { return new Trouble("form", t(key, slots), { fields: [{ loc: field }] }); }
}

// ---------------------------------------------------------------- requests, limits, receipts
const ASPECTS = ["1:1", "4:3", "3:2", "16:9", "3:4", "2:3", "9:16"];
const MAX_SEED = Number.MAX_SAFE_INTEGER;
const FIELDS = { refinePrompt: "prompt", aspectRatio: "aspect", guidanceScale: "guidance", negativePrompt: "negative" };
export const FORM = { prompt: "", negative: "", aspect: "1:1", n: 1, seed: null, steps: null, guidance: null,
  temperature: 0.7, strength: 0.5, lora: null, high: false };

/** What the loaded model allows, from /health. An engine that does not say gets the bounds of the API. */
export function limitsOf(health) {
  const own = { steps: [1, null, 100], guidance: [0, null, 30], native: 512, mask: false };
  return { ...own, loras: health?.loras ?? [], gpu: health?.gpu ?? false, ...health?.limits };
}

const within = ([low, own, high], value) => (value === null ? own : clamp(value, low, high));
const withoutActs = (form, limits) => (within(limits.guidance, form.guidance) ?? 2) > 1;

/** The form as a request. What is null in the form stays out, so that the model's own number acts. */
export function requestOf(form, limits, start) {
  const numbers = { seed: form.seed ?? newSeed(), temperature: form.temperature };
  if (form.steps !== null) numbers.steps = within(limits.steps, form.steps);
  if (form.guidance !== null) numbers.guidanceScale = within(limits.guidance, form.guidance);
  if (form.negative.trim() && withoutActs(form, limits)) numbers.negativePrompt = form.negative.trim();
  if (limits.loras.includes(form.lora)) numbers.lora = form.lora;
  const prompt = form.prompt.trim();
  if (start) {
    const body = { refinePrompt: prompt, config: { ...numbers, strength: form.strength } };
    return { route: "refine", body, images: Array(form.n).fill(start.blob) };
  }
  const body = { prompt, aspectRatio: form.aspect, n: form.n, ...numbers };
  if (form.high && limits.gpu) body.resolution = "high";
  return { route: "generate", body, images: [] };
}

const promptOf = ({ body }) => body.prompt ?? body.refinePrompt ?? body.receipt.prompt;
const countOf = ({ route, body, images }) => (route === "refine" ? images.length : body.n ?? 1);
const ratio = (aspect) => { const [w, h] = aspect.split(":"); return w / h; };
const shapeOf = ({ body: { aspectRatio, receipt }, ratio: own = 1 }) => (
  receipt ? receipt.width / receipt.height : aspectRatio ? ratio(aspectRatio) : own);

/** The shape that was asked for: sizes are rounded, so the nearest usual shape, or else the exact one. */
function aspectOf({ width, height }) {
  const off = (aspect) => Math.abs(Math.log(ratio(aspect) * height / width));
  const nearest = ASPECTS.toSorted((a, b) => off(a) - off(b))[0];
  return off(nearest) < 0.09 ? nearest : `${width}:${height}`;
}

/** A receipt as a form: asked for again, it makes the same picture. */
export function formOf(receipt, limits) {
  return { ...FORM, prompt: receipt.prompt, negative: receipt.negativePrompt, aspect: aspectOf(receipt),
    seed: receipt.seed, steps: receipt.stepsAsked ?? receipt.steps, guidance: receipt.guidanceScale,
    temperature: receipt.temperature, strength: receipt.strength ?? FORM.strength, lora: receipt.loraAlias ?? null,
    high: limits.gpu && receipt.width * receipt.height > (0.87 * limits.native) ** 2 };
}

/** The receipt inside a PNG of ours (its text chunk `aura`), or null. */
export async function receiptIn(blob) {
  const bytes = new DataView(await blob.arrayBuffer());
  const text = (from, to) => new TextDecoder().decode(new Uint8Array(bytes.buffer, from, to - from));
  if (bytes.byteLength < 16 || bytes.getUint32(0) !== 0x89504e47) return null;
  for (let at = 8; at + 12 <= bytes.byteLength;) {
    const end = at + 8 + bytes.getUint32(at);
    if (end > bytes.byteLength) return null;
    const skip = { iTXt: 5, tEXt: 1 }[text(at + 4, at + 8)];
    if (skip && text(at + 8, at + 12) === "aura") {
      try { return JSON.parse(text(at + 12 + skip, end)); } catch { return null; }
    }
    at = end + 4;
  }
  return null;
}

const binary = (bytes) => Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const toBase64 = async (blob) => btoa(binary(new Uint8Array(await blob.arrayBuffer())));
const picture = (text, kind) => new Blob([bytesOf(text)], { type: `image/${kind}` });

function linkOf({ timings, ...receipt }) {
  const text = btoa(binary(new TextEncoder().encode(JSON.stringify(receipt))));
  return `/#r=${text.replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "")}`;
}

/** The receipt in the part of an address behind the #, or null. */
export function receiptOfLink(hash) {
  const text = /^#r=([\w-]+)$/.exec(hash)?.[1];
  return text ? JSON.parse(new TextDecoder().decode(bytesOf(text.replace(/-/g, "+").replace(/_/g, "/")))) : null;
}

const fileName = ({ prompt, seed }) => `${prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40)}-${seed}.png`;

/** A receipt as link, curl, Python or JSON. `address`: where the engine answers; a kernel has none. */
export function copyAs(kind, receipt, limits, address) {
  if (kind === "json") return JSON.stringify(receipt, null, 2);
  if (kind === "link") return address + linkOf(receipt);
  const { route, body } = requestOf(formOf(receipt, limits), limits, receipt.strength && { blob: "START.PNG AS BASE64" });
  const file = fileName(receipt);
  if (kind === "curl") {
    const data = JSON.stringify({ ...body, ...(route === "refine" && { images: ["START.PNG AS BASE64"] }) });
    return `curl -s ${address}/${route} -H 'Content-Type: application/json' -H 'Accept: image/png' \\\n`
      + `  -d '${data.replaceAll("'", "'\\''")}' -o '${file}'`;
  }
  const { prompt, refinePrompt, config, n, ...options } = body;
  const named = Object.entries({ ...options, ...config }).map(([name, value]) => (
    `${name.replace(/[A-Z]/g, (c) => `_${c.toLowerCase()}`)}=${JSON.stringify(value)}`));
  const words = [JSON.stringify(prompt ?? refinePrompt), route === "refine" && '"start.png"', ...named].filter(Boolean);
  return `from aura_engine import AuraClient\n\nclient = AuraClient(${JSON.stringify(address ?? "offline")})\n`
    + `client.${route}(${words.join(", ")}).save(${JSON.stringify(file)})`;
}

/** A picture from outside, small enough to travel: at most `most` pixels a side. */
async function shrunk(blob, most) {
  const bitmap = await createImageBitmap(blob).catch(() => { throw new Trouble("picture", t("notPicture")); });
  const { width, height } = bitmap;
  const scale = Math.min(1, most / Math.max(width, height));
  if (scale === 1 && blob.size < 2e6) return { blob, ratio: width / height };
  const canvas = Object.assign(document.createElement("canvas"), { width: width * scale, height: height * scale });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return { blob: await new Promise((resolve) => { canvas.toBlob(resolve); }), ratio: width / height };
}

// ---------------------------------------------------------------- engines
/** Server-sent events {id, event, data} of a body, cut wherever the network cuts it. */
export async function* eventsIn(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text = (text + value).replace(/\r\n/g, "\n");
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const event = {};
      for (const line of text.slice(0, end).split("\n")) {
        const [, name, rest] = /^(\w+): ?(.*)$/.exec(line) ?? [];
        if (name) event[name] = name in event ? `${event[name]}\n${rest}` : rest;
      }
      if (event.data) yield { ...event, data: JSON.parse(event.data) };
    }
  }
}

function newsFrom({ event: type, data }) {
  if (type === "failed") throw Trouble.from(data.problem);
  const kind = { preview: "jpeg", image: "png" }[type];
  return { type, ...data, blob: kind && picture(data.image, kind) };
}

const storage = (where) => ({
  get(key) { try { return JSON.parse(globalThis[where].getItem(`aura.${key}`)); } catch { return null; } },
  set(key, value) { try { globalThis[where].setItem(`aura.${key}`, JSON.stringify(value)); } catch { /* none in a frame */ } },
});
const [remembered, session] = [storage("localStorage"), storage("sessionStorage")];
const COMES_BACK = { not_ready: "waitLoading", queue_full: "waitBusy", unreachable: "waitAway", asleep: "waitAsleep",
  shutting_down: "waitAway" };

/** An engine behind an address. Work goes through /jobs, so that it lives on when the page goes. */
export class HttpEngine {
  constructor(address = "", name = "local") { Object.assign(this, { address, name }); }

  get key() { return session.get(`key.${this.address}`); }
  set key(value) { session.set(`key.${this.address}`, value); }

  async call(path, { body, method = body ? "POST" : "GET", signal, accept = "application/json" } = {}) {
    const headers = { Accept: accept };
    if (body) headers["Content-Type"] = "application/json";
    if (this.key && path !== "/health") headers.Authorization = `Bearer ${this.key}`;
    const options = { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store" };
    const answer = await fetch(this.address + path, options).catch((error) => {
      if (signal?.aborted) throw error;
      throw new Trouble("unreachable", t(this.address ? "cloudNotReached" : "notReached", location));
    });
    if (answer.ok) return answer;
    const { status } = answer;
    const retryAfter = Number(answer.headers.get("retry-after")) || 0;
    const problem = await answer.json().catch(() => null);
    if (status === 401) throw new Trouble("unauthorized", t(this.key ? "keyWrong" : "keyMissing"), { status });
    if (problem?.detail) throw Trouble.from({ status, ...problem }, retryAfter);
    throw new Trouble(status > 501 ? "asleep" : "stranger", t("notOurs", { status }), { status, retryAfter });
  }

  async health(signal) { return (await this.call("/health", { signal })).json(); }
  async examples() { return (await (await this.call("/examples")).json()).examples; }
  cancel(job) { return this.call(`/jobs/${job}`, { method: "DELETE" }).catch(() => {}); }

  async* generate({ route, body, images }, { signal }) {
    const sent = await Promise.all(images.map(toBase64));
    const request = images.length ? { ...body, images: sent } : body;
    const asked = await this.call("/jobs", { body: { route, request, previews: true } }).catch((trouble) => {
      if (!trouble.fields.some(({ loc }) => loc === "previews")) throw trouble;
    });
    if (!asked) {
      // An engine of an older version: its events come on the POST itself, which ends when the page goes.
      const answer = await this.call(`/${route}`, { body: request, signal, accept: "text/event-stream" });
      for await (const event of eventsIn(answer.body)) yield newsFrom(event);
      return;
    }
    const { id } = await asked.json();
    yield { type: "job", job: id, engine: this.name };
    yield* this.resume(id, { signal });
  }

  /** All events of a job from its first one. A connection that breaks is made again and goes on where it was. */
  async* resume(job, { signal } = {}) {
    let seen = 0;
    for (let pause = 1;; pause = Math.min(2 * pause, 10)) {
      try {
        const { body } = await this.call(`/jobs/${job}/events`, { signal, accept: "text/event-stream" });
        for await (const event of eventsIn(body)) {
          if (Number(event.id) <= seen) continue;
          [seen, pause] = [Number(event.id), 1];
          yield newsFrom(event);
          if (event.event === "done") return;
        }
      } catch (trouble) {
        if (signal?.aborted || (trouble instanceof Trouble && !(trouble.code in COMES_BACK))) throw trouble;
      }
      yield { type: "waits", say: "waitAway", seconds: pause };
      await sleep(pause, signal);
    }
  }
}

/** The page's engines: local, cloud, or whichever can (auto). */
export class Engines {
  seen = {};
  mode = remembered.get("mode") ?? "local";
  cloud = new HttpEngine(remembered.get("cloud") ?? "", "cloud");
  store = new BrowserStore();
  constructor(local = new HttpEngine()) { this.local = local; }

  get order() {
    if (this.mode !== "auto") return [this[this.mode]];
    return this.cloud.address ? [this.local, this.cloud] : [this.local];
  }

  get address() { return this.order[0].address || location.href.split(/[?#]/)[0].replace(/\/$/, ""); }
  set key(value) { for (const engine of this.order) engine.key = value; }

  use({ mode = this.mode, cloud = this.cloud.address }) {
    this.mode = mode;
    this.cloud.address = cloud.trim().replace(/\/+$/, "");
    remembered.set("mode", mode);
    remembered.set("cloud", this.cloud.address);
  }

  async health(signal) {
    const ask = async (engine) => {
      if (engine === this.cloud && !engine.address) return { status: "away", reason: t("noCloud") };
      return engine.health(signal).catch((trouble) => (
        { status: trouble.code === "asleep" ? "asleep" : "away", reason: trouble.message, trouble }));
    };
    const [local, cloud] = await Promise.all([ask(this.local), ask(this.cloud)]);
    this.seen = this.cloud.address ? { local, cloud } : { local };
    const asked = this.order.map((engine) => (engine === this.cloud ? cloud : local));
    return asked.find((health) => health.ready) ?? asked[0];
  }

  examples() { return this.order[0].examples(); }
  resume(job, options) { return this[options.engine].resume(job, options); }
  cancel(job, engine) { return this[engine].cancel(job); }

  async* generate(request, options) {
    for (const [i, engine] of this.order.entries()) {
      try { return yield* engine.generate(request, options); } catch (trouble) {
        const elsewhere = trouble.status >= 500 || trouble.code in COMES_BACK;
        if (!elsewhere || i === this.order.length - 1 || options.signal.aborted) throw trouble;
        yield { type: "waits", say: "waitNext" };
      }
    }
  }
}

/** Ask, and wait through what passes by itself: loading, a full queue, an engine that restarts. Says how long. */
export async function* patiently(engine, request, { signal }) {
  for (let pause = 2;; pause = Math.min(1.5 * pause, 10)) {
    let begun = false;
    try {
      for (let health; !(health = await engine.health(signal)).ready;) {
        if (health.status === "failed") throw new Trouble("failed", t("modelFailed", { why: health.reason }));
        if (health.status !== "loading") throw health.trouble ?? new Trouble(health.code ?? "unreachable", health.reason);
        yield { type: "waits", say: "waitLoading", loading: health.loading };
        await sleep(0.7, signal);
      }
      for await (const event of engine.generate(request, { signal })) {
        begun = event.type !== "waits";
        yield event;
      }
      return;
    } catch (trouble) {
      if (signal.aborted || begun || !(trouble.code in COMES_BACK)) throw trouble;
      const seconds = trouble.retryAfter || pause;
      yield { type: "waits", say: COMES_BACK[trouble.code], seconds };
      await sleep(seconds, signal);
    }
  }
}

/** The kernel as an engine: messages with pictures as binary buffers. */
export class WidgetEngine {
  talks = new Map();
  ended = false;
  constructor(model) {
    this.model = model;
    this.store = new KernelStore(this);
    model.on("msg:custom", (message, buffers) => this.talks.get(message.id)?.(message, buffers));
  }

  get address() { return this.model.get("address") || undefined; }
  get seen() { return this.model.get("engines"); }
  get mode() { return this.model.get("mode"); }
  use({ mode }) { this.put("mode", mode); }
  put(name, value) { this.model.set(name, value); this.model.save_changes(); }
  async examples() { return this.model.get("examples"); }
  async health() {
    return this.ended ? { status: "ended", code: "ended", reason: t("kernelEnded") } : this.model.get("health");
  }

  /** Send a message and read what comes back under its id, until `done` or `end`. */
  async* talk({ id = newId(), ...message }, { buffers = [], signal } = {}) {
    const heard = [];
    let wake;
    const put = (item) => { heard.push(item); wake?.(); };
    const busy = setTimeout(() => put({ type: "waits", say: "waitKernel" }), 1500);
    signal?.addEventListener("abort", () => put({ error: signal.reason }));
    this.talks.set(id, (event, [bytes] = []) => (
      put({ ...event, blob: bytes && new Blob([bytes], { type: event.mime }) })));
    this.model.send({ id, ...message }, undefined, buffers);
    try {
      for (;;) {
        if (!heard.length) await new Promise((resolve) => { wake = resolve; });
        const event = heard.shift();
        if (!event) continue;
        if (event.error) throw event.error;
        if (event.type !== "waits") clearTimeout(busy);
        if (event.type === "end") return;
        if (event.type === "failed") throw Trouble.from(event.problem);
        if (event.type !== "accepted") yield event;
        if (event.type === "done") return;
      }
    } finally {
      clearTimeout(busy);
      this.talks.delete(id);
    }
  }

  /** Whether the kernel still answers. One that was restarted does not, and says nothing by itself. */
  async hello(seconds = 3) {
    const answer = this.talk({ type: "hello" }).next().then(() => true);
    if (await Promise.race([answer, sleep(seconds)])) return;
    this.ended = true;
    for (const put of this.talks.values()) put({ error: new Trouble("ended", t("kernelEnded")) });
  }

  async* generate({ route, body, images, aside }, { signal }) {
    const id = newId();
    yield { type: "job", job: id };
    const sent = [...new Set(images)];
    const buffers = await Promise.all(sent.map((blob) => blob.arrayBuffer()));
    const message = { id, type: "ask", route, body, aside, images: images.map((blob) => sent.indexOf(blob)) };
    yield* this.talk(message, { buffers, signal });
  }

  resume(job, { signal }) { return this.talk({ type: "resume", job }, { signal }); }
  cancel(job) { this.model.send({ type: "cancel", job }); }
}

// ---------------------------------------------------------------- what is kept
const working = ({ timings = {} }) => sum(Object.entries(timings).map(([stage, s]) => (stage === "queue" ? 0 : s)));
const pictureFrom = ({ picture: id, blob, receipt, at = Date.now(), seconds = working(receipt), star = false }) => (
  { id, blob, receipt, at, seconds, star });

/** The page: pictures and jobs in IndexedDB, the form in localStorage, failing that memory. Nothing leaves the browser. */
class BrowserStore {
  most = { pictures: 200, bytes: 200e6 };

  open() {
    return this.db ??= new Promise((resolve) => {
      const asked = indexedDB.open("aura-studio", 1);
      asked.onupgradeneeded = () => {
        for (const name of ["pictures", "jobs", "start"]) asked.result.createObjectStore(name, { keyPath: "id" });
      };
      asked.onsuccess = () => resolve(asked.result);
      asked.onerror = () => resolve(null);
    }).catch(() => null);
  }

  async ask(table, act) {
    const db = await this.open();
    return new Promise((resolve) => {
      const asked = act(db.transaction(table, "readwrite").objectStore(table));
      asked.onsuccess = () => resolve(asked.result);
      asked.onerror = () => resolve([]);
    }).catch(() => []);
  }

  async list() { return (await this.ask("pictures", (s) => s.getAll())).sort((a, b) => b.at - a.at); }
  put({ url, ...picture }) { return this.ask("pictures", (s) => s.put(picture)); }
  // One transaction: all of them go, or none.
  remove(ids) { return this.ask("pictures", (s) => ids.map((id) => s.delete(id)).at(-1)); }
  jobs() { return this.ask("jobs", (s) => s.getAll()); }
  keepJob({ id, job, engine, request, start, at }) {
    return this.ask("jobs", (s) => s.put({ id, job, engine, request, start, at }));
  }
  dropJob(id) { return this.ask("jobs", (s) => s.delete(id)); }
  // Each tab keeps its own form; a new tab begins with the one used last.
  form() { return session.get("form") ?? remembered.get("form"); }
  keepForm(form) { session.set("form", form); remembered.set("form", form); }
  async start() { return (await this.ask("start", (s) => s.getAll()))[0]; }
  keepStart(start) { return this.ask("start", (s) => (start ? s.put({ ...start, id: 0 }) : s.clear())); }
}

/** The notebook: the kernel owns the pictures, the browser asks for them. */
class KernelStore {
  constructor(engine) { Object.assign(this, { engine, model: engine.model }); }
  async list() {
    const found = [];
    for await (const event of this.engine.talk({ type: "history" })) if (event.blob) found.push(pictureFrom(event));
    return found;
  }
  put({ id, star }) { this.model.send({ type: "put", picture: id, star }); }
  remove(ids) { ids.forEach((picture) => this.model.send({ type: "remove", picture })); }
  jobs() {
    return this.model.get("jobs").map(({ request, ...job }) => ({ ...job, request: { ...request, images: Array(job.n).fill(null) } }));
  }
  keepJob() {}
  dropJob() {}
  form() { return this.model.get("value"); }
  keepForm(form) { this.engine.put("value", { ...form }); }
  start() {}
  keepStart() {}
}

// ---------------------------------------------------------------- the state
const AXES = ["steps", "seed", "guidance", "temperature", "strength", "words"];
const free = (url) => url && setTimeout(() => URL.revokeObjectURL(url), 1000);

/** Everything the views show. Says `change` once a turn, and `choice` when another picture is chosen. */
export class Studio extends EventTarget {
  pictures = []; runs = []; chosen = null; spread = null; comparing = null; form = { ...FORM }; start = null;
  health = {}; limits = limitsOf(); examples = []; note = null; trouble = null; wrong = []; offer = null;

  constructor(engine) {
    super();
    Object.assign(this, { engine, store: engine.store });
    // Before anything is drawn: nobody shall type into an empty form that fills itself a moment later.
    Object.assign(this.form, this.store.form());
  }

  /** Have the views drawn again; `focus` names the field that shall have the focus then. */
  touch(focus) {
    this.focus = focus ?? this.focus;
    this.due ??= Promise.resolve().then(() => { this.due = null; this.dispatchEvent(new Event("change")); });
  }

  /** Take up what was there: the pictures and the work under way. Then follow the engine's health. */
  async begin() {
    this.#watch();
    const [pictures, jobs, start] = await Promise.all([this.store.list(), this.store.jobs(), this.store.start()]);
    this.pictures.push(...pictures.filter(({ id }) => !this.find(id)));
    this.chosen ??= this.pictures[0]?.id;
    if (start) this.setStart(start);
    for (const job of jobs) this.pickUp(job);
    if (jobs.length) this.say(t("resumed"));
    this.touch();
  }

  async #watch() {
    for (;; await sleep(this.health.ready ? 4 : 1)) if (!document.hidden) await this.look();
  }

  async look() {
    const before = this.health;
    const { status, ready, reason, model } = this.health = await this.engine.health();
    if (model) this.limits = limitsOf(this.health);
    if (ready && this.trouble?.code === "failed") this.fail(null);
    if (status === "failed" && !this.trouble) this.fail(new Trouble("failed", t("modelFailed", { why: reason })));
    this.touch();
    if (!ready || (before.ready && model === before.model)) return;
    this.examples = await this.engine.examples().catch(() => []);
    this.touch();
  }

  // ---- words for people
  say(text, undo) {
    this.note = text && { text, undo };
    clearTimeout(this.noteEnds);
    if (text) this.noteEnds = setTimeout(() => this.say(""), 6000);
    this.touch();
  }

  fail(trouble, again) {
    const known = !trouble || trouble instanceof Trouble;
    this.trouble = known ? trouble : new Trouble("broken", t("broken", { why: trouble.message }));
    this.wrong = (trouble?.fields ?? []).map(({ loc }) => loc.split(".").pop()).map((name) => FIELDS[name] ?? name);
    this.open ||= this.wrong.some((name) => name !== "prompt");
    if (trouble) this.trouble.again = again;
    this.touch(this.wrong[0]);
  }

  // ---- the form
  set(values) {
    this.store.keepForm(Object.assign(this.form, values));
    if (this.wrong.length) this.fail(null);
    this.touch();
  }

  setStart(start) {
    free(this.start?.url);
    this.store.keepStart(start);
    this.start = start && { ...start, url: URL.createObjectURL(start.blob) };
    this.touch("prompt");
  }

  /** A picture from the person becomes the start. One of ours also offers its settings. */
  async take(file) {
    try {
      const receipt = await receiptIn(file);
      this.setStart({ ...await shrunk(file, 2 * this.limits.native), name: file.name });
      if (receipt) this.offer = { say: t("offer"), act: t("use"), run: () => this.recall({ receipt }) };
    } catch (trouble) { this.fail(trouble); }
  }

  // ---- making pictures
  generate() {
    const { seed, prompt } = this.form;
    if (!prompt.trim()) return this.fail(Trouble.of("prompt", "noPrompt"));
    if (seed !== null && !(seed <= MAX_SEED)) return this.fail(Trouble.of("seed", "seedWrong"));
    this.fail(null);
    return this.run(requestOf(this.form, this.limits, this.start), this.start);
  }

  run(request, start) {
    const run = this.#make({ request: { ...request, ratio: start?.ratio }, start });
    this.runs.unshift(run);
    this.endCompare();
    this.choose(run.id);
    return this.#follow(run);
  }

  /** Work that was under way when the page went, or that Python began. */
  pickUp(job) {
    if (this.runs.some((run) => run.job === job.job)) return;
    const run = this.#make(job);
    this.runs.unshift(run);
    this.choose(run.id);
    this.#follow(run, this.engine.resume(run.job, { engine: run.engine, signal: run.stop.signal }));
  }

  #make(given) {
    const stop = new AbortController();
    const run = { id: newId(), at: Date.now(), n: countOf(given.request), steps: {}, previews: {}, made: [], ...given, stop,
      said: { say: "asking" } };
    const cancel = () => run.job && this.engine.cancel(run.job, run.engine);
    stop.signal.addEventListener("abort", cancel);
    return run;
  }

  async #follow(run, events = patiently(this.engine, run.request, run.stop)) {
    try {
      for await (const event of events) this.#hear(run, event);
    } catch (trouble) {
      const forgotten = trouble.code === "not_found";
      if (run.stop.signal.aborted) this.say(t("stopped"));
      // A restarted engine has forgotten the job. The seed was drawn here: asked again, it makes the same picture.
      else if (forgotten && !run.made.length && run.request.images.every(Boolean)) return this.#follow(run);
      else if (run.aside) run.trouble = trouble.message;
      else if (!forgotten) this.fail(trouble, () => this.run(run.request, run.start));
    }
    this.runs = this.runs.filter((other) => other !== run);
    Object.values(run.previews).forEach(free);
    this.store.dropJob(run.id);
    const [first, second] = run.made;
    if (this.chosen === run.id) {
      this.choose(first?.id ?? this.pictures[0]?.id);
      if (second) this.spread = run.made;
    }
    this.finished = first && t("done");
    this.touch();
    return run.made;
  }

  #hear(run, { type, ...event }) {
    const { index, blob, step, steps } = event;
    if (type === "waits") run.said = { ...event, until: event.seconds && Date.now() + 1000 * event.seconds };
    if (type === "job") {
      Object.assign(run, event);
      if (!run.aside) this.store.keepJob(run);
      if (run.stop.signal.aborted) this.engine.cancel(run.job, run.engine);
    }
    if (type === "queued") run.said = { ...event, say: event.position ? "queued" : "soon", n: whole(event.etaSeconds) };
    if (type === "step") {
      run.steps[index] = step / steps;
      run.said = { say: step < steps ? "step" : "finishing", step, steps };
    }
    if (type === "preview") {
      free(run.previews[index]);
      run.previews[index] = URL.createObjectURL(blob);
    }
    if (type === "image") {
      const made = pictureFrom({ picture: `${run.job ?? run.id}-${index}`, ...event });
      run.made[index] = this.find(made.id) ?? Object.assign(made, { start: run.start?.blob });
      if (!run.aside) this.add(run.made[index]);
    }
    if (type === "done" && event.warnings?.length && !run.aside) this.say(event.warnings.join(" "));
    this.touch();
  }

  add(picture) {
    if (this.find(picture.id)) return;
    this.pictures.unshift(picture);
    this.store.put(picture);
    const { pictures, bytes } = this.store.most ?? {};
    const over = () => this.pictures.length > pictures || sum(this.pictures.map(({ blob }) => blob.size)) > bytes;
    while (over()) {
      const old = this.pictures.findLast((p) => !p.star && p !== picture);
      if (!old) break;
      this.#forget([old]);
      this.say(t("full"));
    }
  }

  // ---- the choice, and what is done with it
  find(id) { return this.pictures.find((picture) => picture.id === id); }
  url(picture) { return (picture.url ??= URL.createObjectURL(picture.blob)); }
  get picture() { return this.find(this.chosen); }
  get running() { return this.runs.find(({ id }) => id === this.chosen); }
  get items() { return [...this.runs, ...this.pictures]; }

  choose(id) {
    Object.assign(this, { chosen: id, spread: null });
    this.dispatchEvent(new Event("choice"));
    this.touch();
  }

  move(by) {
    const { items } = this;
    const at = items.findIndex(({ id }) => id === this.chosen);
    if (items.length) this.choose(items[clamp(at + by, 0, items.length - 1)].id);
  }

  stop(run = this.running ?? this.runs[0]) { run?.stop.abort(); }

  again({ receipt, start } = this.picture) {
    if (receipt.strength && !start) return this.fail(new Trouble("lost", t("lost")));
    const from = start && { blob: start };
    return this.run(requestOf({ ...formOf(receipt, this.limits), seed: null }, this.limits, from), from);
  }

  recall({ receipt, start } = this.picture) {
    this.setStart(start && { blob: start });
    this.open = true;
    this.set(formOf(receipt, this.limits));
  }

  startFrom({ blob, receipt: { prompt, width, height } } = this.picture) {
    this.setStart({ blob, name: prompt, ratio: width / height });
  }

  save(picture = this.picture) {
    const link = document.createElement("a");
    Object.assign(link, { href: this.url(picture), download: fileName(picture.receipt) }).click();
  }

  keep(picture = this.picture) {
    picture.star = !picture.star;
    this.store.put(picture);
    this.touch();
  }

  #forget(gone) {
    this.pictures = this.pictures.filter((picture) => !gone.includes(picture));
    return this.store.remove(gone.map(({ id }) => id));
  }

  async remove(...gone) {
    const before = this.pictures;
    const at = before.indexOf(gone[0]);
    const forgotten = this.#forget(gone);
    if (!this.find(this.chosen)) this.choose((this.pictures[at] ?? this.pictures[at - 1])?.id);
    await forgotten;
    this.say(t(gone.length > 1 ? "cleared" : "removed"), () => {
      this.pictures = [...this.pictures.filter((p) => !before.includes(p)), ...before];
      gone.forEach((picture) => this.store.put(picture));
      this.choose(gone[0].id);
      this.say("");
    });
  }

  // ---- compare: one or two settings, varied around the chosen picture
  compare(picture = this.picture) {
    const form = picture ? formOf(picture.receipt, this.limits) : { ...this.form, n: 1, seed: this.form.seed ?? newSeed() };
    if (!form.prompt.trim()) return this.fail(Trouble.of("prompt", "noPrompt"));
    const start = picture ? picture.start && { blob: picture.start } : this.start;
    this.comparing = { form, start, x: "steps", y: "temperature", xs: [], ys: [], cells: [] };
    this.comparing.text = Object.fromEntries(AXES.map((axis) => [axis, this.#usual(axis, form)]));
    if (!this.axes.includes("steps")) this.comparing.x = "seed";
    return this.touch();
  }

  get axes() {
    const varies = ([low, , high] = [0, , 1]) => low < high;
    return AXES.filter((axis) => varies(this.limits[axis]) && (axis !== "strength" || this.comparing.start));
  }

  range(axis) {
    const [low, , high] = this.limits[axis] ?? [];
    return { seed: [0, MAX_SEED], temperature: [0, 2], strength: [0.05, 1] }[axis] ?? [low, high];
  }

  #usual(axis, { prompt, seed }) {
    const [low, high] = this.range(axis);
    const third = (Math.min(high, low + 9) - low) / 3;
    return {
      words: `${prompt} | `, temperature: "0, 0.5, 1, 1.5", strength: "0.2, 0.4, 0.6, 0.8",
      seed: [0, 1, 2, 3].map((i) => seed + i).join(", "),
      steps: [1, 2, 4, 8].filter((k) => k >= low && k <= high).join(", "),
      guidance: [0, 1, 2, 3].map((i) => Math.round(10 * (low + i * third)) / 10).join(", "),
    }[axis];
  }

  /** The values of an axis as they were written; null when one of them is not allowed. */
  values(axis) {
    if (!axis) return [null];
    const parts = this.comparing.text[axis].split(axis === "words" ? "|" : /[,;\s]+/).map((part) => part.trim());
    const given = parts.filter(Boolean);
    if (!given.length || given.length > 8) return null;
    if (axis === "words") return given;
    const [low, high] = this.range(axis);
    const integer = axis === "steps" || axis === "seed";
    const allowed = (v) => v >= low && v <= high && !(integer && v % 1);
    return given.map(Number).every(allowed) ? given.map(Number) : null;
  }

  /** Make the pictures of the table, four at a time. */
  async fill(c = this.comparing) {
    const [xs, ys] = [this.values(c.x), this.values(c.y)];
    const wrong = xs ? c.y : c.x;
    const allowed = () => this.range(wrong).join("–");
    if (!xs || !ys) return this.fail(Trouble.of(wrong, "axisWrong", { axis: t(wrong), allowed: wrong === "words" ? "" : allowed() }));
    this.fail(null);
    c.cells.forEach(({ run }) => run.stop.abort());
    const cell = (x, y) => {
      const form = { ...c.form, [c.x]: x, [c.y]: y };
      const request = requestOf({ ...form, prompt: form.words ?? form.prompt }, this.limits, c.start);
      return { x, y, run: this.#make({ request: { ...request, aside: true }, start: c.start, aside: true }) };
    };
    Object.assign(c, { xs, ys, cells: ys.flatMap((y) => xs.map((x) => cell(x, y))) });
    this.touch();
    const todo = [...c.cells];
    const work = async () => { while (todo.length && this.comparing === c) await this.#follow(todo.shift().run); };
    return Promise.all([work(), work(), work(), work()]);
  }

  /** The table of a comparison that Python makes: the work of each tile is listened to. */
  show({ jobs = [], form, xs, ys, ...axes }) {
    const make = (job, i) => ({ x: xs[i % xs.length], y: ys[Math.floor(i / xs.length)],
      run: this.#make({ job, aside: true, request: { route: "generate", body: form, images: [] } }) });
    this.comparing = jobs[0] && { ...axes, form, xs, ys, text: {}, cells: jobs.map(make) };
    this.comparing?.cells.forEach(({ run }) => this.#follow(run, this.engine.resume(run.job, run.stop)));
    this.touch();
  }

  /** A tile becomes the choice, and with that part of the history. */
  pick(picture) {
    this.add(picture);
    this.choose(picture.id);
  }

  endCompare() {
    const { cells = [] } = this.comparing ?? {};
    this.comparing = null;
    cells.forEach(({ run }) => run.made.length || run.stop.abort());
    this.touch();
  }
}

// ---------------------------------------------------------------- drawing: a view is described, the DOM made to look like it
const SVG = ["svg", "path", "circle", "rect", "text"];
/** What an element should be: h("div.row", {props}, ...kids); the props may be left out. */
function h(name, ...kids) {
  const [tag, ...classes] = name.split(".");
  const props = kids[0]?.constructor === Object && !kids[0].tag ? kids.shift() : {};
  return { tag, props: { ...(classes[0] && { class: classes.join(" ") }), ...props },
    kids: kids.flat(9).filter((kid) => kid || kid === 0) };
}

function create(kid) {
  if (!kid.tag) return document.createTextNode("");
  if (SVG.includes(kid.tag)) return document.createElementNS("http://www.w3.org/2000/svg", kid.tag);
  return document.createElement(kid.tag);
}

function setProp(el, name, value) {
  const plain = name.startsWith("aria") ? String(value ?? "") : { true: "", false: null }[value] ?? value;
  if (name.startsWith("on")) el[name] = value;
  else if (name.startsWith("--")) el.style.setProperty(name, value);
  else if (plain === null || plain === undefined || value === false && !name.startsWith("aria")) el.removeAttribute(name);
  else if (el.getAttribute(name) !== String(plain)) el.setAttribute(name, plain);
}

/** Make the children of `parent` look like `kids`. Nodes of one kind and key stay, and with them focus and scroll. */
function patch(parent, kids) {
  const old = [...parent.childNodes];
  const nodes = kids.map((kid) => {
    const what = `${kid.tag} ${kid.props?.key}`;
    const at = old.findIndex((node) => node.what === what);
    return at < 0 ? Object.assign(create(kid), { what }) : old.splice(at, 1)[0];
  });
  old.forEach((node) => node.remove());
  nodes.forEach((node, i) => {
    const { tag, props, kids: inner } = kids[i];
    if (parent.childNodes[i] !== node) parent.insertBefore(node, parent.childNodes[i] ?? null);
    if (!tag) { node.data = kids[i]; return; }
    const { key, value, checked, ...rest } = props;
    for (const name of Object.keys(rest)) setProp(node, name, rest[name]);
    patch(node, inner);
    if (value !== undefined && node.value !== String(value)) node.value = value;
    if (checked !== undefined) node.checked = checked;
  });
}

const ICONS = {
  picture: "M3 4h14v12H3zM3 13l4-4 4 4 2-2 4 3M12.5 7.5h.01", x: "M5 5l10 10M15 5L5 15", down: "M6 8l4 4 4-4",
  dice: "M3.5 3.5h13v13h-13zM7 7h.01M13 13h.01M7 13h.01M13 7h.01", up: "M10 16V4M5 9l5-5 5 5",
  sliders: "M3 6h14M3 14h14M7 3.5v5M13 11.5v5", again: "M16 10a6 6 0 1 1-2-4.5M16 2v4h-4", back: "M16 10H4M9 5l-5 5 5 5",
  grid: "M3 3h6v6H3zM11 3h6v6h-6zM3 11h6v6H3zM11 11h6v6h-6z", save: "M10 3v10M5.5 8.5L10 13l4.5-4.5M3 17h14",
  bin: "M4 5.5h12M8 5V3h4v2M5.5 5.5l.7 11.5h7.6l.7-11.5M8.5 9v5M11.5 9v5",
  star: "M10 2.8l2.2 4.7 5 .6-3.7 3.5 1 5-4.5-2.5-4.5 2.5 1-5L2.8 8.1l5-.6z",
};
const SPACE = h("span.grow");
const dim = (...kids) => h("span.dim", ...kids);
const drawn = (side, ...kids) => h("svg", { viewBox: `0 0 ${side} ${side}`, class: "icon", "aria-hidden": true }, ...kids);
const icon = (name) => drawn(20, h("path", { d: ICONS[name] }));
const button = (text, onclick, sign, props) => (
  h("button", { type: "button", onclick, ...props }, sign && icon(sign), text !== "" && h("span", text)));
const small = (text, onclick, sign, { class: more = "", ...props } = {}) => (
  button("", onclick, sign, { title: text, "aria-label": text, ...props, class: `quiet ${more}` }));
const card = (name, label, props, ...kids) => (
  h("section", { key: name, class: `card ${name}`, "aria-label": label, ...props }, ...kids));
const field = (text, control, hidden) => h("label.field", { key: text, hidden }, dim(text), control);
const input = (s, name, props) => (
  h("input", { name, value: s.form[name], oninput: (e) => s.set({ [name]: e.target.value }), ...props }));
const done = (run) => (e) => { e.preventDefault(); run(); };

function radios(label, value, options, onpick, hidden) {
  const tile = ([is, text, sign]) => h("label.option",
    h("input", { type: "radio", name: label, checked: is === value, onchange: () => onpick(is) }), sign, h("span", text));
  return h("fieldset", { key: label, hidden }, h("legend", label), h("div.options", options.map(tile)));
}

function slider(s, name, step, [low, usual, high], hidden = low === high) {
  const own = s.form[name] ?? usual;
  const value = clamp(own ?? low, low, high);
  const at = `${(100 * (value - low)) / (high - low || 1)}%`;
  const changed = s.form[name] !== FORM[name];
  return h("div.field", { key: name, hidden },
    h("div.label", h("span", t(name)), SPACE,
      small(t("own"), () => s.set({ [name]: FORM[name] }), "x", { class: "own", hidden: !changed }),
      h("span.value", own === null ? "auto" : number(value))),
    input(s, name, { type: "range", min: low, max: high, step, "aria-label": t(name), "--at": at, value,
      oninput: (e) => s.set({ [name]: Number(e.target.value) }) }));
}

function shapeIcon(aspect) {
  const r = ratio(aspect);
  const [width, height] = [14 * Math.min(r, 1), 14 / Math.max(r, 1)];
  return drawn(18, h("rect", { x: 9 - width / 2, y: 9 - height / 2, width, height, rx: 1.5 }));
}

// ---------------------------------------------------------------- the view, part by part
const progressOf = ({ stage, file, bytesDone, bytesTotal }) => (file ? t("fetching", { file: last(file) }) : stage)
  + (bytesTotal ? ` · ${t("bytes", { done: bytesDone / 1e9, total: bytesTotal / 1e9 })}` : "");
const sentence = ({ say, loading, until, ...said }) => t(say, until ? { n: whole((until - Date.now()) / 1000) } : said)
  + (loading ? ` ${progressOf(loading)}` : "");
const shareOf = ({ steps, n, made, said: { loading } }) => {
  if (loading?.bytesTotal) return loading.bytesDone / loading.bytesTotal;
  return sum([...Array(n).keys()].map((i) => (made[i] ? 1 : 0.95 * (steps[i] ?? 0)))) / n;
};
const inWork = (queue) => (queue?.length ? ` · ${t("work", { n: queue.length })}` : "");
const runName = ({ request }) => t("making", { prompt: promptOf(request) });
const dot = h("i.dot");

function headView(s) {
  const { status = "connecting", loading, queue, model, gpuName, device } = s.health;
  const more = status === "loading" && loading ? ` · ${progressOf(loading)}` : inWork(queue);
  const fold = () => { s.panel = !s.panel; s.touch(); };
  return h("div.head", h("span.mark"), h("h1", "Aura"),
    h("span.dim.which", model && t("on", { model: last(model), device: gpuName ?? device ?? "…" })), SPACE,
    h("button", { type: "button", class: "quiet state", "data-state": status, "aria-expanded": Boolean(s.panel),
      onclick: fold }, dot, h("span", t(status) + more)));
}

function alertView(s) {
  const { trouble } = s;
  const again = () => { s.fail(null); trouble.again(); };
  const useKey = (e) => { s.engine.key = e.target.closest(".row").querySelector("input").value.trim(); again(); };
  const enter = (e) => { if (e.key === "Enter") done(() => useKey(e))(e); };
  return h("div.alert", { role: "alert", hidden: !trouble }, trouble && [h("p", trouble.message),
    h("div.row",
      trouble.status === 401 ? [h("input", { type: "password", "aria-label": t("key"), placeholder: t("key"), onkeydown: enter }),
        button(t("useKey"), useKey)] : trouble.again && button(t("retry"), again, "again"),
      SPACE, small(t("close"), () => { s.fail(null); s.touch("prompt"); }, "x"))]);
}

function composerView(s) {
  const { form, limits, start, offer } = s;
  const wrong = (name) => s.wrong.includes(name);
  const steps = limits.steps[1] && t("someSteps", { n: within(limits.steps, form.steps) });
  const end = (run) => () => { s.offer = null; run?.(); s.touch("prompt"); };
  const file = ({ target }) => { if (target.files[0]) s.take(target.files[0]); target.value = ""; };
  return h("form", { key: "composer", class: `card composer ${s.open ? "open" : ""}`, novalidate: true,
    onsubmit: done(() => s.generate()) },
  h("label.label", { for: "prompt" }, t(start ? "become" : "prompt")),
  h("div.box",
    h("textarea", { id: "prompt", name: "prompt", rows: 2, maxlength: 2000, placeholder: t("example"), value: form.prompt,
      "aria-invalid": wrong("prompt"), oninput: (e) => s.set({ prompt: e.target.value }) }),
    start && h("div.start", h("img", { alt: "", src: start.url }),
      h("span.grow", start.name || t("yours")), small(t("takeOff"), () => s.setStart(null), "x")),
    h("div.row",
      h("label.button.quiet", { title: t("addPicture") }, icon("picture"), h("input", { type: "file", class: "hidden",
        accept: "image/png,image/jpeg,image/webp", "aria-label": t("addPicture"), onchange: file })),
      h("button", { key: "fold", type: "button", class: "quiet fold", title: t("settings"), "aria-expanded": Boolean(s.open),
        onclick: () => { s.open = !s.open; s.touch(); } }, icon("sliders"),
      h("span", [!start && form.aspect, steps].filter(Boolean).join(" · ")), icon("down")), SPACE,
      h("button.main.go", { key: "go", title: "Ctrl+Enter", "aria-keyshortcuts": "Control+Enter",
        disabled: ["failed", "ended"].includes(s.health.status) }, icon("up"), h("span", t("generate"))))),
  alertView(s),
  offer && h("div.offer", { key: "offer" }, h("span.grow", offer.say),
    button(offer.act, end(offer.run)), small(t("close"), end(), "x")),
  chipsView(s), settingsView(s));
}

function chipsView(s) {
  const { examples } = s;
  const surprise = () => { s.set({ prompt: examples[newSeed() % examples.length] }); s.generate(); };
  const chip = (prompt) => button(prompt, () => { s.set({ prompt }); s.touch("prompt"); }, "", { class: "chip" });
  return h("div.chips", { key: "chips", hidden: !examples.length },
    button(t("surprise"), surprise, "dice", { class: "chip first" }), examples.slice(0, 4).map(chip));
}

function settingsView(s) {
  const { form, limits, start } = s;
  const acts = withoutActs(form, limits);
  const shapes = [...new Set([...ASPECTS, form.aspect])].map((aspect) => [aspect, aspect, shapeIcon(aspect)]);

  const onSeed = ({ target }) => {
    const text = target.value.trim();
    s.set({ seed: text ? (/^\d+$/.test(text) ? Number(text) : NaN) : null });
  };
  return h("div.settings", { key: "settings" },
    radios(t("shape"), form.aspect, shapes, (aspect) => s.set({ aspect }), Boolean(start)),
    radios(t("size"), form.high, [[false, t("standard")], [true, t("high")]], (high) => s.set({ high }), !limits.gpu || Boolean(start)),
    h("div.pair", radios(t("count"), form.n, [1, 2, 3, 4].map((n) => [n, n]), (n) => s.set({ n })),
      h("div.seed",
        field(t("seed"), input(s, "seed", { inputmode: "numeric", autocomplete: "off", placeholder: t("random"),
          "aria-invalid": s.wrong.includes("seed"), value: Number.isNaN(form.seed) ? undefined : form.seed ?? "", oninput: onSeed })),
        small(t("dice"), () => s.set({ seed: newSeed() }), "dice"))),
    slider(s, "strength", 0.05, [0.05, FORM.strength, 1], !start), slider(s, "steps", 1, limits.steps),
    slider(s, "guidance", 0.1, limits.guidance), slider(s, "temperature", 0.05, [0, FORM.temperature, 2]),
    field(t("negative"), input(s, "negative", { maxlength: 2000, disabled: !acts, placeholder: acts ? "" : t("negativeOff") }),
      limits.guidance[2] <= 1),
    field(t("lora"), h("select", { name: "lora", value: form.lora ?? "", onchange: (e) => s.set({ lora: e.target.value || null }) },
      ["", ...limits.loras].map((name) => h("option", { value: name }, name || t("none")))), !limits.loras.length));
}

function stageView(s) {
  const { picture, running: run } = s;
  const made = (one) => ({ src: s.url(one), alt: one.receipt.prompt, class: "", id: one.id });
  const preview = (i) => ({ src: run.previews[i], alt: runName(run), class: run.previews[i] ? "preview" : "blank" });
  const ids = [...Array(run?.n ?? 0).keys()];
  const shown = run ? ids.map((i) => (run.made[i] ? made(run.made[i]) : preview(i))) : (s.spread ?? [picture]).filter(Boolean).map(made);
  const tile = ({ id, ...props }) => (shown.length < 2 ? h("img", props)
    : h("button", { type: "button", disabled: !id, "aria-pressed": id === s.chosen, onclick: () => s.choose(id) }, h("img", props)));
  const light = shown.find(({ src }) => src);
  const shape = run ? shapeOf(run.request) : picture ? picture.receipt.width / picture.receipt.height : 1;
  return card("stage", t("stage"), { hidden: Boolean(s.comparing) },
    light && h("img.glow", { key: "glow", alt: "", src: light.src }),
    !light && !run && h("div.empty", { key: "empty" }, h("span.mark"), h("p", t("empty")), h("p.dim", t("emptyHint"))),
    h("div", { key: "frame", class: `frame ${shown.length > 1 ? "many" : ""}`, hidden: !shown.length, "--ratio": shape }, shown.map(tile)),
    run ? meterView(s, run) : picture && actionsView(s, picture));
}

const action = (key, name, sign, run, props) => button(t(name), run, sign, { title: `${t(name)} (${key})`, "aria-keyshortcuts": key, ...props });

function meterView(s, run) {
  const share = Math.round(100 * shareOf(run));
  const said = sentence(run.said);
  return h("div.actions.meter", { key: "meter" },
    h("div.bar", { role: "progressbar", "aria-label": runName(run), "aria-valuemin": 0, "aria-valuemax": 100,
      "aria-valuenow": share, "aria-valuetext": said, "--at": `${Math.max(3, share)}%` }),
    h("span.said", said), action("Escape", "stop", "x", () => s.stop(run)));
}

function actionsView(s, picture) {
  const star = Boolean(picture.star);
  return h("div.actions", { key: "actions" }, action("V", "again", "again", () => s.again(), { class: "main" }),
    action("E", "start", "back", () => s.startFrom()), action("C", "compare", "grid", () => s.compare()),
    action("S", "save", "save", () => s.save()),
    small(t("star"), () => s.keep(), "star", { class: star ? "on" : "", "aria-pressed": star, "aria-keyshortcuts": "F" }),
    small(t("remove"), () => s.remove(picture), "bin", { "aria-keyshortcuts": "Delete" }));
}

function compareView(s, edit = true) {
  const c = s.comparing;
  if (!c) return null;
  const title = (name, value) => (name && isNaN(value) ? value : name && `${t(name).toLowerCase()} ${number(value)}`);
  const axis = (which, other, names) => {
    const name = c[which];
    const options = names.filter((option) => !option || option !== c[other]).map((option) => h("option", { value: option }, t(option || "none")));
    return [h("select", { key: which, "aria-label": `${t("vary")} (${which})`, value: name, onchange: (e) => { c[which] = e.target.value; s.touch(); } }, options),
      name && [dim(t("over")), h("input", { key: name, name, "aria-label": `${t("over")} (${which})`, "aria-invalid": !s.values(name),
        value: c.text[name], oninput: (e) => { c.text[name] = e.target.value; s.touch(); } })]];
  };
  const cell = ({ x, y, run }) => {
    const [picture] = run.made;
    const src = picture ? s.url(picture) : run.previews[0];
    return h("td", h("button", { type: "button", class: "cell", disabled: !picture, "aria-pressed": picture?.id === s.chosen && Boolean(picture),
      "aria-label": [title(c.x, x), title(c.y, y)].filter(Boolean).join(", "), onclick: () => s.pick(picture) },
    src && h("img", { alt: "", src, class: picture ? "" : "preview" }), run.trouble));
  };
  const of = c.cells.length;
  const rows = c.ys.map((y, i) => h("tr", h("th", { scope: "row" }, title(c.y, y)), c.cells.slice(i * c.xs.length, (i + 1) * c.xs.length).map(cell)));
  const n = edit && (s.values(c.x)?.length ?? 0) * (s.values(c.y)?.length ?? 0);
  return card("compare", t("compare"), {},
    edit && h("form.row.axes", { novalidate: true, onsubmit: done(() => s.fill()) }, dim(t("vary")), axis("x", "y", s.axes), dim(t("and")),
      axis("y", "x", ["", ...s.axes]), h("button.main", t("make", { n })), small(t("close"), () => s.endCompare(), "x")),
    h("div.scroll", { tabindex: 0 }, h("table",
      h("caption", t("grid", c.form), of > 0 && ` · ${t("made", { n: c.cells.filter(({ run }) => run.made.length).length, of })}`),
      of > 0 && h("thead", h("tr", h("td"), c.xs.map((x) => h("th", { scope: "col" }, title(c.x, x))))), h("tbody", rows))));
}

function historyView(s) {
  const { items } = s;
  const none = !s.running && !s.picture;
  const option = (item, i) => {
    const { id, request, previews, star } = item;
    const src = request ? Object.values(previews)[0] : s.url(item);
    const name = request ? runName(item) : item.receipt.prompt;
    const ring = { cx: 18, cy: 18, r: 14 };
    return h("li", { key: id, role: "option", title: name, "aria-label": name, "aria-selected": id === s.chosen,
      tabindex: id === s.chosen || (none && !i) ? 0 : -1, onclick: () => { s.choose(id); s.touch("chosen"); } },
    src && h("img", { alt: "", src }), star && icon("star"),
    request && h("svg", { viewBox: "0 0 36 36", class: "ring", "aria-hidden": true }, h("circle", ring),
      h("circle", { ...ring, class: "done", pathLength: 100, "stroke-dasharray": `${100 * shareOf(item)} 100` })));
  };
  return card("history", t("pictures"), { hidden: !items.length },
    h("div.row", h("h2", t("pictures")), dim(s.pictures.length), SPACE,
      s.pictures.length > 1 && button(t("clear"), () => s.remove(...s.pictures), "", { class: "link" })),
    h("ul", { role: "listbox", "aria-label": t("pictures"), class: "tiles" }, items.map(option)));
}

const factList = (facts) => h("dl", Object.entries(facts).filter(([, value]) => value || value === 0).map(([key, value]) => (
  h("div", { key, class: `fact-${key}` }, h("dt", t(key).toLowerCase()), h("dd", value)))));

function receiptView(s) {
  const picture = s.shown = s.picture ?? s.shown;
  if (!picture) return null;
  const { receipt: r, seconds } = picture;
  const { address } = s.engine;
  const copy = async (kind) => {
    const text = copyAs(kind, r, s.limits, address);
    try { await navigator.clipboard.writeText(text); } catch { s.copied = text; return s.touch("copied"); }
    s.copied = "";
    return s.say(t("copied"));
  };
  const facts = { seed: button(r.seed, () => s.set({ seed: r.seed }), "", { class: "link", title: t("useSeed") }),
    size: `${r.width} × ${r.height}`, steps: r.stepsAsked > r.steps ? `${r.steps} / ${r.stepsAsked}` : r.steps,
    guidance: number(r.guidanceScale), temperature: number(r.temperature), strength: r.strength && number(r.strength),
    negative: r.negativePrompt, lora: r.loraAlias, sampler: r.scheduler, model: last(r.model),
    time: seconds && t("seconds", { n: number(seconds, 1) }), notes: r.corrections?.join("; ") };
  const kinds = [address && !r.strength && "link", address && "curl", "python", "json"].filter(Boolean);
  return card("receipt", t("receipt"), { class: `card receipt ${s.picture ? "" : "old"}` },
    h("h2", t("receipt")), h("p", r.prompt), factList(facts),
    h("div.row", action("R", "use", "", () => s.recall(picture)), dim(t("copy")),
      kinds.map((kind) => button(t(kind), () => copy(kind), "", { class: "link" }))),
    s.copied && h("textarea", { name: "copied", key: "copied", readonly: true, rows: 4, "aria-label": t("copyThis"), value: s.copied, onfocus: (e) => e.target.select() }));
}

function engineFacts({ status, queue, memory, ...e }) {
  const gib = (bytes) => number(bytes / 2 ** 30, 1);
  return { status: t(status) + inWork(queue), reason: e.reason, advice: e.advice?.join(" "), url: e.url, model: e.model,
    device: e.gpuName ?? e.device, loras: e.loras?.join(", "), scheduler: e.scheduler, precision: e.precision, queue: queue && t("queueIs", queue),
    memory: memory && t("gib", { n: gib(memory.rss) }) + (memory.gpu ? `, ${t("gpuGib", { n: gib(memory.gpu) })}` : ""), version: e.version,
    optimizations: e.optimizations?.join(", "), warnings: e.warnings?.join("; "), lately: e.lately };
}

/** Milliseconds of one step by how many pictures share it: bars that hardly grow mean that batching pays. */
function stepChart(costs = {}) {
  const rows = Object.entries(costs).map(([n, seconds], i) => (
    { n, ms: Math.round(1000 * seconds), x: 40 * i, height: (44 * seconds) / Math.max(...Object.values(costs)) }));
  const bar = ({ n, ms, x, height }) => [h("rect", { x: x + 6, y: 62 - height, width: 28, height, rx: 3 }),
    h("text", { x: x + 20, y: 74 }, n), h("text", { x: x + 20, y: 58 - height }, ms)];
  const words = rows.map(({ n, ms }) => `${n}: ${ms}`).join(", ");
  return rows.length > 0 && h("figure", h("figcaption.dim", t("stepCost")),
    h("svg", { viewBox: `0 0 ${40 * rows.length} 76`, role: "img", "aria-label": words }, rows.map(bar)));
}

function engineView(s, always) {
  if (!always && !s.panel) return null;
  const { mode, cloud, seen } = s.engine;
  const use = (what) => { s.engine.use(what); s.look(); };
  const one = ([name, health]) => h("div", { key: name }, h("h2", { "data-state": health.status }, dot, t(name)),
    factList(engineFacts(health)), stepChart(health.stepCost));
  return card("engine", t("engine"), {},
    mode && radios(t("which"), mode, ["local", "cloud", "auto"].map((name) => [name, t(name)]), (to) => use({ mode: to })),
    cloud && field(t("address"), h("input", { type: "url", placeholder: "https://name-engine.hf.space", value: cloud.address,
      onchange: (e) => use({ cloud: e.target.value }) })),
    h("div.engines", Object.entries(seen).map(one)), !always && h("p.dim", t("keys")));
}

function noteView(s) {
  const { note, runs: [run] } = s;
  const { step, steps, until } = run?.said ?? {};
  const worth = run && !until && (!step || step === 1 || step === steps);
  if (worth || !run) s.heard = run ? sentence(run.said) : s.finished;
  return h("div", h("div", { role: "status", class: "hidden" }, note?.text ?? s.heard),
    note && h("div.note", note.text, note.undo && button(t("undo"), note.undo, "", { class: "link" })));
}

const VIEWS = {
  studio: (s) => [headView(s), engineView(s), h("div.body", composerView(s), stageView(s), compareView(s), historyView(s), receiptView(s)), noteView(s)],
  engine: (s) => [headView(s), engineView(s, true)],
  compare: (s) => [compareView(s, false), receiptView(s), noteView(s)],
};

// ---------------------------------------------------------------- hosts
const DARK = { "data-jp-theme-light": /false/, "data-vscode-theme-kind": /dark|high-contrast$/, "data-theme": /dark/ };
function isDark() {
  const places = [document.body, document.documentElement];
  for (const [name, dark] of Object.entries(DARK)) {
    const place = places.find((one) => one.hasAttribute(name));
    if (place) return dark.test(place.getAttribute(name));
  }
  return places.some((place) => place.classList.contains("dark")) || matchMedia("(prefers-color-scheme: dark)").matches;
}

const LETTERS = { v: "again", e: "startFrom", c: "compare", r: "recall", s: "save", f: "keep", delete: "remove", backspace: "remove" };

/** What a key does, if anything. Letters act only where nobody types. */
function actionOf(e, s, target) {
  const inList = target.matches("[role=option]");
  const row = () => Math.max(1, Math.floor(target.parentNode.clientWidth / (target.offsetWidth + 8)));
  const steps = { ArrowLeft: () => -1, ArrowRight: () => 1, ArrowUp: () => -row(), ArrowDown: row, Home: () => -1e6, End: () => 1e6 };
  if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) return () => s.generate();
  if (e.key === "Escape") return s.runs.length ? () => s.stop() : s.comparing && (() => s.endCompare());
  if (e.ctrlKey || e.metaKey || e.altKey || target.matches("input:not([type=radio], [type=range]), textarea, select")) return null;
  if (inList && e.key in steps) return () => { s.move(steps[e.key]()); s.touch("chosen"); };
  if (e.key === "/") return () => s.touch("prompt");
  const name = s.picture && LETTERS[e.key.toLowerCase()];
  return name && (() => { s[name](s.picture); if (name === "remove" && inList) s.touch("chosen"); });
}

/** Show a Studio, or the part of it that `view` names, in `host`, with the style sheet `styles`. Returns what ends it. */
export function mount(host, s, { styles, view = "studio", texts: own } = {}) {
  texts = { ...texts, ...own };
  const root = host.shadowRoot ?? host.attachShadow({ mode: "open" });
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(styles);
  root.adoptedStyleSheets = [sheet];
  host.setAttribute("data-lm-suppress-shortcuts", "true");
  const el = Object.assign(document.createElement("div"), { className: `aura ${view}` });
  el.dataset.drop = t("drop");
  root.replaceChildren(el);

  const draw = () => {
    const focused = root.activeElement;
    patch(el, VIEWS[view](s).filter(Boolean));
    const { focus } = s;
    if (focus && (s.view ?? root) === root) {
      s.focus = null;
      root.querySelector(focus === "chosen" ? "[role=option][tabindex='0']" : `[name="${focus}"]`)?.focus();
    } else if (focused && !root.activeElement) root.querySelector("[name=prompt], button")?.focus();
  };
  const dark = () => host.toggleAttribute("data-dark", isDark());
  const tick = setInterval(() => s.runs.some(({ said }) => said.until) && draw(), 500);
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const observer = new MutationObserver(dark);
  for (const place of [document.body, document.documentElement]) observer.observe(place, { attributes: true });
  scheme.addEventListener("change", dark);
  s.addEventListener("change", draw);

  const take = (e, { files }) => { if (files.length && view === "studio") done(() => s.take(files[0]))(e); };
  const over = (e, on) => {
    if (e.dataTransfer.types.includes("Files")) e.preventDefault();
    el.classList.toggle("over", on && view === "studio");
  };
  const on = {
    keydown: (e) => {
      s.view = root;
      const act = !e.isComposing && !e.defaultPrevented && actionOf(e, s, e.target);
      if (act) { e.stopPropagation(); done(act)(e); }
    },
    pointerdown: () => { s.view = root; },
    paste: (e) => take(e, e.clipboardData),
    dragover: (e) => over(e, true), dragleave: (e) => over(e, false), drop: (e) => { over(e, false); take(e, e.dataTransfer); },
  };
  for (const [name, run] of Object.entries(on)) el.addEventListener(name, run);
  dark();
  draw();
  return () => {
    clearInterval(tick);
    observer.disconnect();
    scheme.removeEventListener("change", dark);
    s.removeEventListener("change", draw);
  };
}

/** The page at `/`: engines over HTTP, and a link's picture offered. */
export async function openPage(host, styles) {
  const s = new Studio(new Engines());
  mount(host, s, { styles });
  try {
    const receipt = receiptOfLink(location.hash);
    const run = () => {
      history.replaceState(null, "", location.pathname);
      s.run({ route: "replay", images: [], body: { receipt } });
    };
    if (receipt) s.offer = { say: t("shared", receipt), act: t("makeIt"), run };
  } catch { s.fail(new Trouble("link", t("badLink"))); }
  await s.begin();
  s.touch("prompt");
}

/** The notebook widget: one state for all its views. */
export default function widget() {
  let s;
  return {
    initialize({ model }) {
      const engine = new WidgetEngine(model);
      const get = (name) => model.get(name);
      s = new Studio(engine);
      s.addEventListener("choice", () => { if (s.picture && get("choice") !== s.chosen) engine.put("choice", s.chosen); });
      model.on("change:value", () => { Object.assign(s.form, get("value")); s.touch(); });
      model.on("change:choice", () => { if (get("choice") !== s.chosen && s.find(get("choice"))) s.choose(get("choice")); });
      model.on("change:examples", () => { s.examples = get("examples"); s.touch(); });
      for (const name of ["health", "engines", "mode"]) model.on(`change:${name}`, () => s.look());
      model.on("change:jobs", () => s.store.jobs().forEach((job) => s.pickUp(job)));
      model.on("change:table", () => s.show(get("table")));
      model.on("comm_live_update", () => engine.hello());
      if (get("view") === "studio") s.begin();
      else s.look();
      s.show(get("table") ?? {});
    },
    render: ({ model, el }) => mount(el, s, { styles: model.get("styles"), view: model.get("view") }),
  };
}
