// The page at `/`: a Studio whose engine answers over HTTP.
import { Studio, TEXTS, Trouble, mount, t } from "./studio.js";

async function toBase64(blob) {
	const bytes = new Uint8Array(await blob.arrayBuffer());
	return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
}

const picture = (text, kind) => (
	new Blob([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], { type: `image/${kind}` }));

/** Server-sent events, cut wherever the network cuts them. */
export async function* eventsIn(body) {
	const reader = body.pipeThrough(new TextDecoderStream()).getReader();
	let text = "";
	for (;;) {
		const { value, done } = await reader.read().catch(() => ({ done: true }));
		if (done) return;
		const blocks = (text + value).replace(/\r\n/g, "\n").split("\n\n");
		text = blocks.pop();
		for (const block of blocks) {
			const said = { event: "", data: "" };
			for (const [, name, part] of block.matchAll(/^(event|data): ?(.*)/gm)) said[name] += part;
			if (said.data) yield { ...said, data: JSON.parse(said.data) };
		}
	}
}

const storage = (where) => ({
	get(key) { try { return JSON.parse(globalThis[where][`aura.${key}`] ?? null); } catch { return null; } },
	set(key, value) { try { globalThis[where][`aura.${key}`] = JSON.stringify(value); } catch { /* none in a frame */ } },
});
const [remembered, session] = [storage("localStorage"), storage("sessionStorage")];

const away = () => new Trouble("away", t("away"));

/** Over HTTP. Work goes through /jobs: it lives on when the page goes. */
class HttpEngine {
	seen = {};
	store = new BrowserStore();
	address = location.href.split(/[?#]/)[0].replace(/\/$/, "");
	key = session.get("key");

	useKey(key) {
		this.key = key;
		session.set("key", key);
	}

	async call(path, { body, method = body ? "POST" : "GET", signal, accept = "application/json" } = {}) {
		const headers = { Accept: accept };
		if (body) headers["Content-Type"] = "application/json";
		if (this.key && path !== "/health") headers.Authorization = `Bearer ${this.key}`;
		const options = { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store" };
		const answer = await fetch(this.address + path, options).catch(() => { throw away(); });
		if (answer.ok) return answer;
		const { status } = answer;
		const retryAfter = Number(answer.headers.get("retry-after"));
		const problem = await answer.json().catch(() => null);
		if (problem?.detail) throw Trouble.from({ status, ...problem }, { retryAfter });
		throw new Trouble(status > 501 ? "asleep" : "stranger", t("notOurs", { status }), { status, retryAfter });
	}

	async json(path, options) { return (await this.call(path, options)).json(); }

	async health(signal) {
		const health = await this.json("/health", { signal }).catch((trouble) => (
			{ status: trouble.code, reason: trouble.message, trouble }));
		this.seen = { local: health };
		return health;
	}

	async examples() { return (await this.json("/examples")).examples; }
	cancel(job) { return this.call(`/jobs/${job}`, { method: "DELETE" }).catch(() => {}); }

	async* generate({ route, body, images }, { signal }) {
		const sent = await Promise.all(images.map(toBase64));
		const request = images.length ? { ...body, images: sent } : body;
		const { id } = await this.json("/jobs", { body: { route, request, previews: true } });
		yield { type: "job", job: id };
		yield* this.resume(id, { signal });
	}

	async* resume(job, { signal }) {
		const { body } = await this.call(`/jobs/${job}/events`, { signal, accept: "text/event-stream" });
		for await (const { event: type, data } of eventsIn(body)) {
			if (type === "failed") throw Trouble.from(data.problem, { over: true });
			const kind = { preview: "jpeg", image: "png" }[type];
			yield { type, ...data, blob: kind && picture(data.image, kind) };
			if (type === "done") return;
		}
		throw away();
	}
}

/** IndexedDB, failing that memory. Nothing leaves the browser. */
class BrowserStore {
	most = 200e6; // bytes of pictures

	/** What IndexedDB answers, if there is one. */
	async ask(table, act) {
		const answer = (asked, onupgradeneeded) => new Promise((resolve, reject) => {
			Object.assign(asked, { onupgradeneeded, onsuccess: () => resolve(asked.result), onerror: reject });
		});
		const tables = ({ target }) => ["pictures", "jobs", "start"].map((name) => (
			target.result.createObjectStore(name, { keyPath: "id" })));
		try {
			const db = await (this.db ??= answer(indexedDB.open("aura-studio", 1), tables));
			return await answer(act(db.transaction(table, "readwrite").objectStore(table)));
		} catch {
			s.say(t("notKept"));
			return [];
		}
	}

	async all(table) { return (await this.ask(table, (s) => s.getAll())).sort((a, b) => b.at - a.at); }
	put(table, { url, ...thing }) { return this.ask(table, (s) => s.put(thing)); }
	// One transaction: all of them go, or none.
	remove(table, ids) { return this.ask(table, (s) => ids.map((id) => s.delete(id)).at(-1)); }
	// Each tab keeps its own form; a new one begins with the last.
	form() { return session.get("form") ?? remembered.get("form"); }
	keepForm(form) { session.set("form", form); remembered.set("form", form); }
}

function receiptOfLink(hash) {
	try { return JSON.parse(decodeURIComponent(/^#r=(.+)/.exec(hash)[1])); } catch { return null; }
}

const load = (name) => fetch(new URL(name, import.meta.url));
const [styles, texts] = await Promise.all([load("studio.css"), load("texts.json")]);
Object.assign(TEXTS, await texts.json());
const s = new Studio(new HttpEngine());
mount(document.getElementById("studio"), s, { styles: await styles.text() });
const receipt = receiptOfLink(location.hash);
const run = () => {
	history.replaceState(null, "", location.pathname);
	s.run({ route: "replay", images: [], body: { receipt } });
};
if (receipt) s.offer = { say: t("shared", receipt), act: "makeIt", run };
await s.begin();
s.focusOn("prompt");
