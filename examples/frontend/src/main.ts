// The page: two forms, the pictures, and the state of both engines.
import { type Answer, cloud, type Engine, first, local, type Mode, resolution } from "./engines";

function element<T extends HTMLElement>(selector: string, kind: new () => T): T {
  const found = document.querySelector(selector);
  if (!(found instanceof kind)) throw new Error(`the page has no ${selector}`);
  return found;
}

const ask = element("#ask", HTMLFormElement);
const change = element("#change", HTMLFormElement);
const said = element("#said", HTMLParagraphElement);
const pictures = element("#pictures", HTMLElement);
const panel = element("#engines", HTMLDListElement);

let images: string[] = [];

function text(form: HTMLFormElement, name: string): string {
  const value = new FormData(form).get(name);
  return typeof value === "string" ? value : "";
}

function show(engine: Engine, answer: Answer): void {
  images = answer.images;
  pictures.replaceChildren(...images.map((base64, i) => {
    const picture = new Image();
    picture.src = `data:image/png;base64,${base64}`;
    picture.alt = answer.receipts[i]?.prompt ?? "";
    return picture;
  }));
  change.hidden = false;
  said.textContent = [`Drawn by the ${engine.name} engine.`, ...answer.warnings].join(" ");
}

/** Let an engine of the chosen mode draw, and show what it made, or what went wrong. */
async function draw(work: (engine: Engine) => Promise<Answer>): Promise<void> {
  const buttons = document.querySelectorAll("button");
  for (const button of buttons) button.disabled = true;
  said.textContent = "Drawing …";
  try {
    show(...await first(text(ask, "mode") as Mode, work));
  } catch (error) {
    said.textContent = error instanceof Error ? error.message : String(error);
  } finally {
    for (const button of buttons) button.disabled = false;
  }
}

ask.addEventListener("submit", (event) => {
  event.preventDefault();
  void draw(async (engine) => engine.generate({
    prompt: text(ask, "prompt"),
    aspectRatio: text(ask, "aspectRatio"),
    temperature: Number(text(ask, "temperature")),
    resolution: await resolution(engine),
  }));
});

change.addEventListener("submit", (event) => {
  event.preventDefault();
  void draw((engine) => engine.refine({ refinePrompt: text(change, "refinePrompt"), images }));
});

async function status(engine: Engine): Promise<string> {
  try {
    const health = await engine.health();
    const device = health.gpuName ?? health.device ?? "no device yet";
    const more = [health.scheduler, health.precision, ...health.optimizations].filter(Boolean).join(", ");
    return [`${health.status} on ${device}`, health.model, more, health.reason, ...health.warnings].filter(Boolean).join("\n");
  } catch (error) {
    return error instanceof Error ? error.message : String(error);
  }
}

function row(kind: "dt" | "dd", words: string): HTMLElement {
  const cell = document.createElement(kind);
  cell.textContent = words;
  return cell;
}

async function refresh(): Promise<void> {
  const engines = [local, cloud];
  const states = await Promise.all(engines.map(status));
  panel.replaceChildren(...engines.flatMap((engine, i) => [row("dt", engine.name), row("dd", states[i] ?? "")]));
  setTimeout(() => void refresh(), 5000);
}

void refresh();
