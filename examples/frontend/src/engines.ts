// The engines that this page knows, and which of them draws.
import createClient from "openapi-fetch";
import type { components, paths } from "./api";

export type Health = components["schemas"]["Health"];
export type Answer = components["schemas"]["Answer"];
type Generate = components["schemas"]["GenerateRequest"];
type Refine = components["schemas"]["RefineRequest"];
export type Mode = "local" | "cloud" | "auto";

const { VITE_LOCAL_ENGINE_URL, VITE_CLOUD_ENGINE_URL } = import.meta.env;

/** An engine that cannot answer now. Another one may. */
export class Unavailable extends Error {}

/** A request that would be wrong everywhere. */
export class Refused extends Error {}

export class Engine {
  readonly url: string;
  private readonly client;

  constructor(readonly name: string, url: string) {
    this.url = url.trim();
    this.client = createClient<paths, "application/json">({ baseUrl: this.url });
  }

  async health(): Promise<Health> {
    return this.answered(() => this.client.GET("/health", { signal: AbortSignal.timeout(10_000) }));
  }

  async generate(body: Generate): Promise<Answer> {
    return this.answered(() => this.client.POST("/generate", { body }));
  }

  async refine(body: Refine): Promise<Answer> {
    return this.answered(() => this.client.POST("/refine", { body }));
  }

  /** What the engine answers, or one of the two errors above. */
  private async answered<T>(call: () => Promise<{ data?: T; error?: unknown; response: Response }>): Promise<T> {
    if (!this.url) throw new Unavailable(`No address is set for the ${this.name} engine.`);
    const { data, error, response } = await call().catch((): never => {
      throw new Unavailable(`${this.url} cannot be reached. Is it running, and does its ALLOW_ORIGINS name ${location.origin}?`);
    });
    if (data !== undefined) return data;
    const detail = (error as { detail?: string } | undefined)?.detail ?? `status ${String(response.status)}`;
    const busy = response.status >= 500 || response.status === 429;
    throw busy ? new Unavailable(`${this.url}: ${detail}`) : new Refused(detail);
  }
}

export const local = new Engine("local", VITE_LOCAL_ENGINE_URL ?? "http://127.0.0.1:7860");
export const cloud = new Engine("cloud", VITE_CLOUD_ENGINE_URL ?? "");

const CHOICES: Record<Mode, Engine[]> = { local: [local], cloud: [cloud], auto: [local, cloud] };

/** `work` by the first engine of `mode` that can do it. Auto prefers the local one. */
export async function first<T>(mode: Mode, work: (engine: Engine) => Promise<T>): Promise<[Engine, T]> {
  const failed: string[] = [];
  for (const engine of CHOICES[mode]) {
    try {
      return [engine, await work(engine)];
    } catch (error) {
      if (!(error instanceof Unavailable)) throw error;
      failed.push(error.message);
    }
  }
  throw new Unavailable(failed.join(" "));
}

/** "high" only on an engine that reports a GPU, as the guide says. */
export async function resolution(engine: Engine): Promise<"high" | "standard"> {
  if (engine !== cloud) return "standard";
  return (await engine.health()).gpu ? "high" : "standard";
}
