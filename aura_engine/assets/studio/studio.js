// The Studio: one module, for the page at `/` and for notebooks.

// ---- texts
/** Hosts fill it from texts.json. A word that it lacks stands for itself. */
export const TEXTS = {};

const number = (n) => n.toLocaleString(undefined, { maximumFractionDigits: 2, useGrouping: false });
export const t = (key, slots = {}) => (TEXTS[key] ?? String(key)).replace(/\{(\w+)\}/g, (_, name) => {
	const value = slots[name] ?? "";
	return typeof value === "number" ? number(value) : value;
});

const newSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];
export const newId = () => `${Date.now()}-${newSeed()}`;
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const whole = (seconds) => Math.max(1, Math.ceil(seconds));
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const upTo = (n) => [...Array(n).keys()];
const last = (path) => String(path).split("/").pop();

export function sleep(seconds, signal) {
	return new Promise((resolve, reject) => {
		signal?.throwIfAborted();
		setTimeout(resolve, 1000 * seconds);
		signal?.addEventListener("abort", () => reject(signal.reason));
	});
}

/** `code` is for the program, the message for people, `fields` for the form. */
export class Trouble extends Error {
	constructor(code, message, more) { Object.assign(super(message), { code, fields: [], ...more }); }

	/** Wrong fields are said in the form's words. */
	static from({ type = "", detail, title, status, errors: fields = [] }, more) {
		const said = fields.map(({ loc, allowed }) => allowed && `${t(fieldOf(loc))}: ${allowed}.`);
		return new Trouble(type.replace("urn:aura:", ""), said.join(" ") || detail || title, { status, fields, ...more });
	}

	static of(field, key, slots) { return new Trouble("form", t(key, slots), { fields: [{ loc: field }] }); }
}

// ---- requests, limits, receipts
const ASPECTS = "1:1 4:3 3:2 16:9 3:4 2:3 9:16".split(" ");
const FIELDS = { refinePrompt: "prompt", aspectRatio: "shape", guidanceScale: "guidance", negativePrompt: "negative" };
/** "request.images.0" -> "images" */
const fieldOf = (loc) => { const name = loc.split(".").findLast(isNaN); return FIELDS[name] ?? name; };
export const FORM = { prompt: "", negative: "", aspect: "1:1", n: 1, seed: null, steps: null, guidance: null,
	temperature: 0.7, strength: null, lora: null, high: false };

/** What the model allows, [least, its own, most]; at first, what the API allows. */
export function limitsOf({ loras = [], gpu = false, limits } = {}) {
	return { native: 512, loras, gpu, steps: [1, null, 100], guidance: [0, null, 30], seed: [0, null, 2 ** 53 - 1],
		temperature: [0, FORM.temperature, 2], strength: [0.05, 0.5, 1], ...limits };
}

const within = ([low, own, high], value) => (value === null ? own : clamp(value, low, high));
const withoutActs = (form, limits) => (within(limits.guidance, form.guidance) ?? 2) > 1;

export function requestOf(form, limits, start) {
	const numbers = { seed: form.seed ?? newSeed(), temperature: form.temperature };
	if (form.steps !== null) numbers.steps = within(limits.steps, form.steps);
	if (form.guidance !== null) numbers.guidanceScale = within(limits.guidance, form.guidance);
	if (form.negative.trim() && withoutActs(form, limits)) numbers.negativePrompt = form.negative.trim();
	if (limits.loras.includes(form.lora)) numbers.lora = form.lora;
	const prompt = form.prompt.trim();
	if (start) {
		const { mask, crop } = start;
		if (form.strength !== null) numbers.strength = form.strength;
		if (mask && crop) numbers.paddingMaskCrop = crop;
		const body = { refinePrompt: prompt, ...(mask && { mask }), config: numbers };
		return { route: "refine", body, images: Array(form.n).fill(start.blob) };
	}
	const body = { prompt, aspectRatio: form.aspect, n: form.n, ...numbers };
	if (form.high && limits.gpu) body.resolution = "high";
	return { route: "generate", body, images: [] };
}

const promptOf = ({ body }) => body.prompt ?? body.refinePrompt ?? body.receipt.prompt;
const ratio = (aspect) => { const [w, h] = aspect.split(":"); return w / h; };
const shapeOf = ({ request, receipt = request.body.receipt, start }) => {
	const { width, height } = start ?? receipt ?? {};
	return width ? width / height : ratio(request.body.aspectRatio ?? "1:1");
};

/** The usual shape that is near (sizes are rounded), or the exact one. */
function aspectOf({ width, height }) {
	const off = (aspect) => Math.abs(Math.log(ratio(aspect) * height / width));
	const nearest = ASPECTS.toSorted((a, b) => off(a) - off(b))[0];
	return off(nearest) < 0.09 ? nearest : `${width}:${height}`;
}

export function formOf(receipt, limits) {
	return { ...FORM, prompt: receipt.prompt, negative: receipt.negativePrompt, aspect: aspectOf(receipt),
		seed: receipt.seed, steps: receipt.stepsAsked ?? receipt.steps, guidance: receipt.guidanceScale,
		temperature: receipt.temperature, strength: receipt.strength ?? null, lora: receipt.loraAlias ?? null,
		high: limits.gpu && receipt.width * receipt.height > (0.87 * limits.native) ** 2 };
}

/** The receipt inside a PNG of ours, or null. */
export async function receiptIn(blob) {
	const bytes = await blob.arrayBuffer();
	const at = new TextDecoder("latin1").decode(bytes).search(/(iTXt|tEXt)aura\0/);
	if (at < 4) return null;
	const chunk = new TextDecoder().decode(bytes.slice(at, at + 4 + new DataView(bytes).getUint32(at - 4)));
	try { return JSON.parse(chunk.slice(chunk.indexOf("{"))); } catch { return null; }
}

const fileName = ({ prompt, seed }) => (
	`${(prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["aura"]).join("-").slice(0, 40)}-${seed}.png`);

function copyAs(kind, receipt, limits, address) {
	if (kind === "json") return JSON.stringify(receipt, null, 2);
	if (kind === "link") return `${address}/#r=${encodeURIComponent(JSON.stringify({ ...receipt, timings: undefined }))}`;
	const mask = receipt.maskSha256 && (kind === "curl" ? "MASK.PNG AS BASE64" : "mask.png");
	const start = receipt.strength && { mask, crop: receipt.paddingMaskCrop };
	const { route, body } = requestOf(formOf(receipt, limits), limits, start);
	const file = fileName(receipt);
	if (kind === "curl") {
		const data = JSON.stringify({ ...body, ...(route === "refine" && { images: ["START.PNG AS BASE64"] }) });
		return `curl -s ${address}/${route} -H 'Content-Type: application/json' -H 'Accept: image/png' \\\n`
			+ `  -d '${data.replaceAll("'", "'\\''")}' -o '${file}'`;
	}
	const { prompt, refinePrompt, config, n, ...options } = body;
	const named = Object.entries({ ...options, ...config }).map(([name, value]) => (
		`, ${name.replace(/[A-Z]/g, (c) => `_${c.toLowerCase()}`)}=${JSON.stringify(value)}`));
	const given = JSON.stringify(prompt ?? refinePrompt) + (start ? ', "start.png"' : "") + named.join("");
	return `import aura_engine as ae\n\nclient = ae.AuraClient(${JSON.stringify(address ?? "offline")})\n`
		+ `client.${route}(${given}).save(${JSON.stringify(file)})\n`;
}

/** A picture, small enough to travel. */
async function shrunk(blob, most) {
	const bitmap = await createImageBitmap(blob).catch(() => { throw new Trouble("picture", t("notPicture")); });
	const scale = Math.min(1, most / Math.max(bitmap.width, bitmap.height));
	const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.round(scale * side));
	if (scale === 1 && blob.size < 2e6) return { blob, width, height };
	const canvas = new OffscreenCanvas(width, height);
	canvas.getContext("2d").drawImage(bitmap, 0, 0, width, height);
	return { blob: await canvas.convertToBlob(), width, height };
}

// ---- the brush
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** Draw the strokes of a mask. Sizes are shares of the width. */
function drawMask(canvas, { strokes = [] }, colour) {
	const { width, height } = canvas;
	const pen = canvas.getContext("2d");
	pen.reset();
	for (const { how, size, soft, line } of strokes) {
		Object.assign(pen, { globalCompositeOperation: how, strokeStyle: colour, shadowColor: colour, lineCap: "round",
			lineJoin: "round", lineWidth: width * size * (1 - soft), shadowBlur: width * size * soft });
		pen.beginPath();
		// A dot is a line too, and has some length.
		line.forEach(([x, y], i) => pen.lineTo(x * width, y * height + !i / 99));
		pen.stroke();
	}
	return pen;
}

const COMES_BACK = { not_ready: "waitLoading", queue_full: "waitBusy", unreachable: "waitAway", away: "waitAway",
	asleep: "waitAsleep", shutting_down: "waitAway", draining: "waitAway", not_found: "asking" };

const isOver = ({ status }) => ["failed", "ended"].includes(status);
const troubleOf = ({ status, reason: why, trouble }) => (
	trouble ?? new Trouble(status, status === "failed" ? t("modelFailed", { why }) : why));

/** The events of a run. Waits through what passes by itself. */
async function* patiently(engine, run) {
	const { signal } = run.stop;
	for (let pause = 2;; pause = Math.min(1.5 * pause, 10)) {
		try {
			for (let health; !run.job && !(health = await engine.health(signal)).ready;) {
				const { status, loading } = health;
				if (!["loading", "connecting"].includes(status)) throw troubleOf(health);
				yield { type: "waits", say: loading ? "waitLoading" : status, loading };
				await sleep(0.7, signal);
			}
			yield* run.job ? engine.resume(run.job, { signal }) : engine.generate(run.request, { signal });
			return;
		} catch (trouble) {
			// A restarted engine forgot the job. Asked again with its seed, it makes the same picture.
			const over = trouble.over || trouble.code === "not_found";
			const canAsk = !run.made.length && run.request.images;
			if (signal.aborted || !(trouble.code in COMES_BACK) || (over && !canAsk)) throw trouble;
			if (over) run.job = null;
			const seconds = trouble.retryAfter || pause;
			yield { type: "waits", say: COMES_BACK[trouble.code], seconds };
			await sleep(seconds, signal);
		}
	}
}

const working = ({ timings = {} }) => sum(Object.entries(timings).map(([stage, s]) => (stage === "queue" ? 0 : s)));
export const pictureFrom = ({ picture: id, blob, receipt, at = Date.now(), seconds, star = false }) => (
	{ id, blob, receipt, at, seconds: seconds ?? working(receipt), star });

// What Compare varies, and what it proposes.
const AXES = { steps: () => [1, 2, 4, 8], seed: ({ seed }) => upTo(4).map((i) => seed + i),
	guidance: () => [1, 1.5, 2, 3, 5, 7.5], temperature: () => [0, 0.5, 1, 1.5], strength: () => [0.2, 0.4, 0.6, 0.8],
	words: ({ prompt }) => [`${prompt} | `] };
const WHOLE = ["steps", "seed"];
const free = (url) => url && setTimeout(() => URL.revokeObjectURL(url), 1000);

/** What the views show. Says `change` once a turn, and `choice`. */
export class Studio extends EventTarget {
	pictures = []; runs = []; chosen = null; spread = null; comparing = null; form = { ...FORM }; start = null; wrong = [];
	health = {}; limits = limitsOf(); examples = []; note = null; trouble = null; offer = null;
	painting = false; brush = { size: 0.15, soft: 0.35, how: "source-over", at: [0.5, 0.5] };

	constructor(engine) {
		super();
		Object.assign(this, { engine, store: engine.store });
		// Before it is drawn: a form must not fill itself under somebody's hands.
		Object.assign(this.form, this.store.form());
	}

	/** Take values and draw. `focus` names the field that gets the focus. */
	touch(values) {
		Object.assign(this, values);
		this.due ??= Promise.resolve().then(() => { this.due = null; this.dispatchEvent(new Event("change")); });
	}

	focusOn(focus) { this.touch({ focus }); }

	async begin() {
		this.#watch();
		const tables = ["pictures", "jobs", "start"].map((table) => this.store.all(table));
		const [pictures, jobs, [start]] = await Promise.all(tables);
		this.pictures.push(...pictures.filter(({ id }) => !this.find(id)));
		this.chosen ??= this.pictures[0]?.id;
		if (start) await this.setStart(start);
		for (const job of jobs) this.pickUp(job);
		if (jobs.length) this.say(t("resumed"));
		this.touch();
	}

	async #watch() {
		for (;; await sleep(this.health.ready ? 4 : 1)) if (!document.hidden) await this.look();
	}

	async look() {
		const before = this.health;
		const health = await this.engine.health();
		const { ready, model } = health;
		this.touch({ health, ...(model && { limits: limitsOf(health) }) });
		if (ready && this.trouble?.code === "failed") this.fail(null);
		if (isOver(health) && !this.trouble) this.fail(troubleOf(health));
		if (!ready || (before.ready && model === before.model)) return;
		this.touch({ examples: await this.engine.examples().catch(() => []) });
	}

	say(text, undo) {
		clearTimeout(this.noteEnds);
		if (text) this.noteEnds = setTimeout(() => this.say(""), 6000);
		this.touch({ note: text && { text, undo } });
	}

	fail(trouble, again) {
		const known = !trouble || trouble instanceof Trouble;
		if (trouble?.status === 401) trouble.message = t(this.engine.key ? "keyWrong" : "keyMissing");
		this.trouble = known ? trouble : new Trouble("broken", t("broken", { why: trouble.message }));
		this.wrong = (trouble?.fields ?? []).map(({ loc }) => fieldOf(loc));
		this.open ||= this.wrong.some((name) => name !== "prompt");
		if (trouble) this.trouble.again = again;
		this.touch({ focus: this.wrong[0] ?? this.focus });
	}

	set(values) {
		this.store.keepForm(Object.assign(this.form, values));
		if (this.wrong.length) this.fail(null);
		this.touch();
	}

	/** The picture to start from, or null. */
	setStart(start) {
		free(this.start?.url);
		if (!start) this.store.remove("start", [0]);
		this.touch({ start: null, painting: false, focus: "prompt" });
		if (start) this.#keepStart({ ...start, url: URL.createObjectURL(start.blob) });
	}

	// Pictures know what they started from, so it is never changed in place.
	#keepStart(start) {
		this.store.put("start", { ...start, id: 0 });
		this.touch({ start });
	}

	paint(painting = !this.painting) {
		this.endCompare();
		this.touch({ painting, focus: painting ? "mask" : "prompt" });
	}

	stroke(more) {
		const { start, brush } = this;
		const stroke = { ...brush, line: [brush.at, brush.at], ...more };
		this.touch({ start: { ...start, strokes: [...start.strokes ?? [], stroke] } });
	}

	masked(change) {
		const start = { ...this.start, ...change };
		const { width, height } = start;
		const canvas = Object.assign(document.createElement("canvas"), { width, height });
		const { data } = drawMask(canvas, start, "#fff").getImageData(0, 0, width, height);
		const share = Math.ceil(sum(data.filter((_, i) => i % 4 > 2)) / (2.55 * width * height));
		this.#keepStart({ ...start, share, mask: share > 0 && canvas.toDataURL() });
		this.touch({ finished: t("mayChange", { share }) });
	}

	undo() { this.masked({ strokes: (this.start.strokes ?? []).slice(0, -1) }); }

	async take(file, name) {
		this.fail(null);
		try {
			const receipt = !name && await receiptIn(file);
			this.setStart({ ...await shrunk(file, 2 * this.limits.native), name: name ?? file.name });
			if (receipt) this.offer = { say: t("offer"), act: "recall", run: () => this.recall({ receipt }) };
		} catch (trouble) { this.fail(trouble); }
	}

	generate() {
		const { seed, prompt } = this.form;
		if (!prompt.trim()) return this.fail(Trouble.of("prompt", "noPrompt"));
		if (seed !== null && !this.allows("seed", seed)) return this.fail(Trouble.of("seed", "seedWrong"));
		this.fail(null);
		return this.run(requestOf(this.form, this.limits, this.start), this.start);
	}

	run(request, start) {
		const run = this.make({ request, start });
		this.endCompare();
		return this.#show(run);
	}

	pickUp(job) {
		if (!this.runs.some((run) => run.job === job.job)) this.#show(this.make(job));
	}

	make(given) {
		const stop = new AbortController();
		const { images, body } = given.request;
		const run = { id: newId(), at: Date.now(), n: images?.length || body.n || 1, steps: {}, previews: {}, made: [],
			said: { say: "asking" }, ...given, stop };
		stop.signal.addEventListener("abort", () => run.job && this.engine.cancel(run.job));
		return run;
	}

	#show(run) {
		this.runs.unshift(run);
		this.choose(run.id);
		return this.follow(run);
	}

	async follow(run) {
		try {
			for await (const event of patiently(this.engine, run)) this.#hear(run, event);
		} catch (trouble) {
			if (run.stop.signal.aborted) this.say(t("stopped"));
			else if (run.aside) run.trouble = trouble.message;
			else if (trouble.code !== "not_found") this.fail(trouble, () => this.run(run.request, run.start));
		}
		this.runs = this.runs.filter((other) => other !== run);
		Object.values(run.previews).forEach(free);
		this.store.remove("jobs", [run.id]);
		const [first, second] = run.made;
		if (this.chosen === run.id) {
			this.choose(first?.id ?? this.items[0]?.id);
			if (second) this.spread = run.made;
		}
		this.touch({ finished: first && t("done") });
		if (!run.aside) this.look();
		return run.made;
	}

	#hear(run, { type, ...event }) {
		const { index, blob, step, steps, position, seconds, etaSeconds, warnings } = event;
		const hears = {
			waits: () => { run.said = { ...event, until: seconds && Date.now() + 1000 * seconds }; },
			job: () => this.#keepJob(Object.assign(run, event)),
			queued: () => { run.said = { position, say: position ? "queued" : "soon", n: whole(etaSeconds) }; },
			step: () => {
				run.steps[index] = step / steps;
				run.said = { say: step < steps ? "step" : "finishing", step, steps };
			},
			preview: () => {
				free(run.previews[index]);
				run.previews[index] = URL.createObjectURL(blob);
			},
			image: () => {
				const made = pictureFrom({ picture: `${run.job ?? run.id}-${index}`, ...event });
				run.made[index] = this.find(made.id) ?? Object.assign(made, { start: run.start });
				if (!run.aside) this.add(run.made[index]);
			},
			done: () => { if (warnings?.length && !run.aside) this.say(warnings.join(" ")); },
		};
		hears[type]?.();
		this.touch();
	}

	#keepJob({ id, job, request, start, at, aside, stop }) {
		if (!aside) this.store.put("jobs", { id, job, request, start, at });
		if (stop.signal.aborted) this.engine.cancel(job);
	}

	add(picture) {
		if (this.find(picture.id)) return;
		this.pictures.unshift(picture);
		this.store.put("pictures", picture);
		while (sum(this.pictures.map(({ blob }) => blob.size)) > this.store.most) {
			const old = this.pictures.findLast((one) => !one.star && one !== picture);
			if (!old) return;
			this.#forget([old]);
			this.say(t("full"));
		}
	}

	find(id) { return this.pictures.find((picture) => picture.id === id); }
	url(picture) { return (picture.url ??= URL.createObjectURL(picture.blob)); }
	get picture() { return this.find(this.chosen); }
	get running() { return this.runs.find(({ id }) => id === this.chosen); }
	get items() { return [...this.runs, ...this.pictures]; }

	choose(chosen) {
		this.touch({ chosen, spread: null, painting: false });
		this.dispatchEvent(new Event("choice"));
	}

	move(by) {
		const { items } = this;
		const at = items.findIndex(({ id }) => id === this.chosen);
		this.choose(items[clamp(at + by, 0, items.length - 1)].id);
	}

	stop(run = this.running ?? this.runs[0]) { run.stop.abort(); }

	again() {
		const { receipt, start } = this.picture;
		if (receipt.strength && !start) return this.fail(new Trouble("lost", t("lost")));
		return this.run(requestOf({ ...formOf(receipt, this.limits), seed: null }, this.limits, start), start);
	}

	recall({ receipt, start = null } = this.picture) {
		this.setStart(start);
		this.open = true;
		this.set(formOf(receipt, this.limits));
	}

	startFrom() {
		this.focusOn("prompt");
		return this.take(this.picture.blob, this.picture.receipt.prompt);
	}

	save() {
		const { picture } = this;
		const anchor = document.createElement("a");
		Object.assign(anchor, { href: this.url(picture), download: fileName(picture.receipt) }).click();
	}

	keep() {
		const { picture } = this;
		picture.star = !picture.star;
		this.store.put("pictures", picture);
		this.touch();
	}

	#forget(gone) {
		this.pictures = this.pictures.filter((picture) => !gone.includes(picture));
		return this.store.remove("pictures", gone.map(({ id }) => id));
	}

	async remove(...gone) {
		if (!gone.length) gone = [this.picture];
		const before = this.pictures;
		const at = before.indexOf(gone[0]);
		const forgotten = this.#forget(gone);
		if (!this.picture) this.choose((this.pictures[at] ?? this.items.at(-1))?.id);
		await forgotten;
		this.say(t("removed"), () => {
			this.pictures = [...this.pictures.filter((p) => !before.includes(p)), ...before];
			gone.forEach((picture) => this.store.put("pictures", picture));
			this.choose(gone[0].id);
			this.say("");
		});
	}

	compare() {
		const { receipt, start } = this.picture;
		const form = formOf(receipt, this.limits);
		const usual = (axis) => AXES[axis](form).filter((value) => this.allows(axis, value)).join(", ");
		const text = Object.fromEntries(Object.keys(AXES).map((axis) => [axis, usual(axis)]));
		this.comparing = { form, start, y: "temperature", xs: [], ys: [], cells: [], text };
		[this.comparing.x] = this.axes;
		this.touch({ painting: false });
	}

	get axes() {
		const varies = ([low, , high] = [0, , 1]) => low < high;
		return Object.keys(AXES).filter((axis) => varies(this.limits[axis]) && (axis !== "strength" || this.comparing.start));
	}

	allows(axis, value) {
		const [low, , high] = this.limits[axis] ?? [];
		return low === undefined || (value >= low && value <= high && !(WHOLE.includes(axis) && value % 1));
	}

	/** The values of an axis, or null. */
	values(axis) {
		if (!axis) return [null];
		const words = axis === "words";
		const given = this.comparing.text[axis].split(words ? "|" : /[,;\s]+/).map((part) => part.trim()).filter(Boolean);
		const values = words ? given : given.map(Number);
		return values.length && values.length <= 8 && values.every((value) => this.allows(axis, value)) ? values : null;
	}

	async fill() {
		const c = this.comparing;
		const [xs, ys] = [this.values(c.x), this.values(c.y)];
		if (!xs || !ys) {
			const axis = xs ? c.y : c.x;
			const [low = "", , high = ""] = this.limits[axis] ?? [];
			return this.fail(Trouble.of(axis, "axisWrong", { axis: t(axis), allowed: `${low}–${high}` }));
		}
		this.fail(null);
		c.cells.forEach(({ run }) => run.stop.abort());
		const cell = (x, y) => {
			const form = { ...c.form, [c.x]: x, [c.y]: y };
			const request = requestOf({ ...form, prompt: form.words ?? form.prompt }, this.limits, c.start);
			return { x, y, run: this.make({ request: { ...request, aside: true }, start: c.start, aside: true }) };
		};
		Object.assign(c, { xs, ys, cells: ys.flatMap((y) => xs.map((x) => cell(x, y))) });
		this.touch();
		const todo = [...c.cells];
		const work = async () => { while (todo.length && this.comparing === c) await this.follow(todo.shift().run); };
		return Promise.all([work(), work(), work(), work()]);
	}

	pick(picture) {
		this.add(picture);
		this.choose(picture.id);
	}

	endCompare() {
		this.comparing?.cells.forEach(({ run }) => run.made.length || run.stop.abort());
		this.touch({ comparing: null });
	}
}

// ---- drawing
/** An element to be: h("div.row", {props}, ...kids). */
function h(name, ...kids) {
	const [tag, ...classes] = name.split(".");
	const props = kids[0]?.constructor === Object && !kids[0].tag ? kids.shift() : {};
	return { tag, props: { ...(classes[0] && { class: classes.join(" ") }), ...props },
		kids: kids.flat(9).filter((kid) => kid || kid === 0) };
}

function create({ tag, props }) {
	if (!tag) return document.createTextNode("");
	if (tag === "svg" || tag === "path") return document.createElementNS("http://www.w3.org/2000/svg", tag);
	return Object.assign(document.createElement(tag), tag === "button" && { type: "button" });
}

function setProp(el, name, value) {
	const aria = name.startsWith("aria");
	if (name.startsWith("on")) el[name] = value;
	else if (name.startsWith("--")) el.style.setProperty(name, value);
	else if ((value ?? false) === false && !aria) el.removeAttribute(name);
	else if (el.getAttribute(name) !== String(value)) el.setAttribute(name, value === true && !aria ? "" : value);
}

/** Make `parent` look like `kids`. Nodes of one kind and key stay, with their focus. */
function patch(parent, kids) {
	const old = [...parent.childNodes];
	const nodes = kids.map((kid) => {
		const what = `${kid.tag} ${kid.props?.key}`;
		const at = old.findIndex((node) => node.what === what);
		return at < 0 ? Object.assign(create(kid), { what }) : old.splice(at, 1)[0];
	});
	old.forEach((node) => node.remove());
	nodes.forEach((node, i) => {
		if (parent.childNodes[i] !== node) parent.insertBefore(node, parent.childNodes[i] ?? null);
		if (!kids[i].tag) { node.data = kids[i]; return; }
		const { key, value, checked, ...rest } = kids[i].props;
		for (const name of Object.keys(rest)) setProp(node, name, rest[name]);
		patch(node, kids[i].kids);
		if (value !== undefined && node.value !== String(value)) node.value = value;
		if (checked !== undefined) node.checked = checked;
	});
}

const ICONS = {
	picture: "M3 4h14v12H3zM3 13l4-4 8 7M13 8h.01", x: "M5 5l10 10M15 5L5 15", down: "M6 8l4 4 4-4",
	generate: "M10 16V4M5 9l5-5 5 5",
	again: "M16 10a6 6 0 1 1-2-4.5M16 2v4h-4", startFrom: "M16 10H4M9 5l-5 5 5 5",
	compare: "M3 3h5v5H3zM12 3h5v5h-5zM3 12h5v5H3zM12 12h5v5h-5z", save: "M10 3v10M5 8l5 5 5-5M3 17h14",
	remove: "M4 6h12M8 6V3h4v3M6 6v11h8V6",
	paint: "M13 3l4 4-9 9-5 1 1-5z", keep: "M10 3l2 5h5l-4 3 2 6-5-4-5 4 2-6-4-3h5z",
};
const SPACE = h("span.grow");
const CHOSEN = "[role=option][tabindex='0']";
const DOT = h("i.dot");
const dim = (...kids) => h("span.dim", ...kids);
const icon = (name) => ICONS[name] && (
	h("svg.icon", { viewBox: "0 0 20 20", "aria-hidden": true }, h("path", { d: ICONS[name] })));
const face = (name) => [icon(name), h("span", t(name))];
const button = (name, onclick, props) => h("button", { onclick, ...props }, face(name));
const link = (name, onclick, props) => h("button.link", { onclick, ...props }, t(name));
const small = (name, sign, onclick, { class: more = "", ...props } = {}) => (
	h("button", { onclick, title: t(name), ...props, class: `quiet ${more}` }, icon(sign)));
const card = (name, props, ...kids) => (
	h("div", { key: name, role: "group", class: `card ${name}`, "aria-label": t(name), ...props }, ...kids));
const field = (name, control, hidden) => h("label.field", { key: name, hidden }, dim(t(name)), control);
const select = (name, value, options, onpick, props) => (
	h("select", { name, value, onchange: (e) => onpick(e.target.value), ...props },
		options.map((option) => h("option", { value: option }, t(option || "none")))));
const done = (run) => (e) => { e.preventDefault(); run(); };

function radios(name, value, options, onpick, hidden) {
	const tile = ([is, text, sign]) => h("label.option",
		h("input", { type: "radio", name, checked: is === value, onchange: () => onpick(is) }), sign, h("span", text));
	return h("fieldset", { key: name, hidden }, h("legend", t(name)), h("div.options", options.map(tile)));
}

function range(name, value, [min, , max], step, oninput) {
	return h("input", { type: "range", name, min, max, step, value, "aria-label": t(name),
		"--at": `${(100 * (value - min)) / (max - min || 1)}%`, oninput: (e) => oninput(Number(e.target.value)) });
}

function slider(s, name, step, hidden) {
	const [low, usual, high] = s.limits[name];
	const own = s.form[name] ?? (name === "strength" && s.start?.mask ? 1 : usual);
	const set = (value) => s.set({ [name]: value });
	return h("div.field", { key: name, hidden: hidden || low === high },
		h("div.label", h("span", t(name)), SPACE,
			small("own", "x", () => set(FORM[name]), { class: "own", hidden: s.form[name] === FORM[name] }),
			h("span.value", own === null ? "auto" : number(own))),
		range(name, clamp(own ?? low, low, high), s.limits[name], step, set));
}

const progressOf = ({ stage, file, bytesDone, bytesTotal }) => t(stage, { file: last(file) })
	+ (file && bytesTotal ? ` · ${t("bytes", { done: bytesDone / 1e9, total: bytesTotal / 1e9 })}` : "");
const sentence = ({ say, loading, until, ...slots }) => {
	if (until) slots.n = whole((until - Date.now()) / 1000);
	if (loading) slots.progress = progressOf(loading);
	return t(say, slots);
};
const shareOf = ({ steps, n, made, said: { loading } }) => (loading?.bytesTotal ? loading.bytesDone / loading.bytesTotal
	: sum(upTo(n).map((i) => (made[i] ? 1 : 0.95 * (steps[i] ?? 0)))) / n);
const runName = ({ request }) => t("making", { prompt: promptOf(request) });

function headView(s) {
	const { status = "connecting", loading, queue, model, gpuName, device } = s.health;
	return h("div.head", h("span.mark"), h("h1", "Aura"),
		h("span.dim.which", model && t("on", { model: last(model), device: gpuName ?? device ?? "…" })), SPACE,
		h("button.quiet.state", { "data-state": status, "aria-expanded": Boolean(s.panel),
			onclick: () => s.touch({ panel: !s.panel }) }, DOT,
		h("span", [t(status), status === "loading" && loading && progressOf(loading),
			queue?.length > 0 && t("work", { n: queue.length })].filter(Boolean).join(" · "))));
}

function alertView(s) {
	const { trouble } = s;
	const close = () => s.fail(null);
	const again = () => { close(); trouble.again(); };
	const useKey = ({ target }) => {
		s.engine.useKey(target.closest(".row").firstChild.value.trim());
		again();
	};
	const onkeydown = (e) => e.key === "Enter" && done(() => useKey(e))(e);
	return h("div.alert", { role: "alert", hidden: !trouble }, trouble && [h("p", trouble.message), h("div.row",
		trouble.status === 401 ? [h("input", { type: "password", "aria-label": t("key"), placeholder: t("key"),
			onkeydown }), button("useKey", useKey)] : !s.wrong[0] && trouble.again && button("retry", again),
		SPACE, small("close", "x", () => { close(); s.focusOn("prompt"); }))]);
}

function composerView(s) {
	const { form, limits, start, offer } = s;
	const steps = limits.steps[1] && t("someSteps", { n: within(limits.steps, form.steps) });
	const end = (run) => () => { s.offer = null; run?.(); s.focusOn("prompt"); };
	const file = ({ target }) => { if (target.files[0]) s.take(target.files[0]); target.value = ""; };
	return h("form", { class: `card composer ${s.open ? "open" : ""}`,
		onsubmit: done(() => s.generate()) },
	h("label.label", { for: "prompt" }, t(start ? "become" : "prompt")),
	h("div.box",
		h("textarea", { id: "prompt", name: "prompt", placeholder: t("example"), value: form.prompt,
			"aria-invalid": s.wrong.includes("prompt"), oninput: (e) => s.set({ prompt: e.target.value }) }),
		start && h("div.start", h("img", { alt: "", src: start.url, title: start.name }),
			limits.mask ? h("button.quiet", { "aria-pressed": s.painting, onclick: () => s.paint() }, icon("paint"),
				h("span", t(start.mask ? "mayChange" : "paint", start))) : h("span", start.name), SPACE,
			small("takeOff", "x", () => s.setStart(null))),
		h("div.row",
			h("label.button.quiet", { title: t("addPicture") }, icon("picture"), h("input.hidden", { type: "file",
				accept: "image/*", "aria-label": t("addPicture"), onchange: file })),
			h("button.quiet.fold", { key: "fold", title: t("settings"), "aria-expanded": Boolean(s.open),
				onclick: () => s.touch({ open: !s.open }) },
			h("span", [!start && form.aspect, steps].filter(Boolean).join(" · ")), icon("down")), SPACE,
			h("button.main", { key: "go", type: "submit", ...keyed("generate"), disabled: isOver(s.health) }, face("generate")))),
	alertView(s),
	offer && h("div.row.offer", { key: "offer" }, h("span", offer.say), SPACE,
		button(offer.act, end(offer.run)), small("close", "x", end())),
	chipsView(s), settingsView(s));
}

function chipsView(s) {
	const { examples } = s;
	const surprise = () => { s.set({ prompt: examples[newSeed() % examples.length] }); s.generate(); };
	const write = (prompt) => { s.set({ prompt }); s.focusOn("prompt"); };
	const chip = (prompt) => h("button.chip", { onclick: () => write(prompt) }, prompt);
	return h("div.chips", { hidden: !examples.length },
		h("button.chip.first", { onclick: surprise }, t("surprise")),
		examples.slice(0, 4).map(chip));
}

function settingsView(s) {
	const { form, limits, start } = s;
	const acts = withoutActs(form, limits);
	const set = (name) => (value) => s.set({ [name]: value });
	const shapes = [...new Set([...ASPECTS, form.aspect])].map((aspect) => (
		[aspect, aspect, h("i.shape", { "--ratio": ratio(aspect) })]));
	const onSeed = ({ target }) => {
		const text = target.value.trim();
		s.set({ seed: text ? (/^\d+$/.test(text) ? Number(text) : NaN) : null });
	};
	return h("div.settings",
		radios("shape", form.aspect, shapes, set("aspect"), Boolean(start)),
		radios("size", form.high, [[false, t("standard")], [true, t("high")]], set("high"), !limits.gpu || Boolean(start)),
		h("div.pair", radios("count", form.n, [1, 2, 3, 4].map((n) => [n, n]), set("n")),
			field("seed", h("input", { name: "seed", inputmode: "numeric", autocomplete: "off", placeholder: t("random"),
				oninput: onSeed, "aria-invalid": s.wrong.includes("seed"),
				value: Number.isNaN(form.seed) ? undefined : form.seed ?? "" }))),
		slider(s, "strength", 0.05, !start), slider(s, "steps", 1), slider(s, "guidance", 0.1),
		slider(s, "temperature", 0.05),
		field("negative", h("input", { name: "negative", value: form.negative, disabled: !acts,
			placeholder: !acts && t("negativeOff"), oninput: (e) => set("negative")(e.target.value) }),
			limits.guidance[2] <= 1),
		field("lora", select("lora", form.lora ?? "", ["", ...limits.loras], (name) => s.set({ lora: name || null })),
			!limits.loras.length));
}

function stageView(s) {
	if (s.painting) return paintView(s);
	const { picture, running: run } = s;
	const made = (one) => ({ src: s.url(one), alt: one.receipt.prompt, class: "", id: one.id });
	const at = (i, src = run.previews[i]) => (run.made[i] ? made(run.made[i])
		: { src, alt: runName(run), class: src ? "preview" : "blank" });
	const shown = run ? upTo(run.n).map((i) => at(i)) : (s.spread ?? [picture]).filter(Boolean).map(made);
	const tile = ({ id, ...props }) => (shown[1] ? h("button", { disabled: !id, "aria-pressed": id === s.chosen,
		onclick: () => s.choose(id) }, h("img", props)) : h("img", props));
	const light = shown.find(({ src }) => src);
	return card("stage", { hidden: Boolean(s.comparing) },
		light && h("img.glow", { alt: "", src: light.src }),
		!shown.length && h("div.empty", { key: "empty" }, h("span.mark"), h("p", t("empty"))),
		h("div", { key: "frame", class: shown[1] ? "frame many" : "frame", hidden: !shown.length,
			"--ratio": run || picture ? shapeOf(run ?? picture) : 1 }, shown.map(tile)),
		run ? meterView(s, run) : picture && actionsView(s, picture));
}

function paintView(s) {
	const { start: { url, width, height, crop }, brush } = s;
	const [x, y] = brush.at;
	const erases = brush.how !== "source-over";
	const follow = ({ target, clientX, clientY }) => {
		const box = target.getBoundingClientRect();
		brush.at = [(clientX - box.x) / box.width, (clientY - box.y) / box.height];
		s.touch();
	};
	const down = (e) => {
		if (e.button || !e.isPrimary) return;
		follow(e);
		s.stroke();
		e.target.setPointerCapture(e.pointerId);
	};
	const go = (e) => {
		follow(e);
		if (e.isPrimary && e.target.hasPointerCapture(e.pointerId)) s.start.strokes.at(-1).line.push(brush.at);
	};
	const set = (values) => { Object.assign(brush, values); s.touch(); };
	// A stroke that is wider than any picture takes all of it.
	const all = (how) => () => { s.stroke({ how, size: 9, soft: 0 }); s.masked(); };
	return card("stage", {},
		h("div.frame.paint", { key: "paint", "--ratio": width / height }, h("img", { alt: "", src: url }),
			h("canvas", { name: "mask", width: 512, height: Math.round(512 * height / width), tabindex: 0, role: "application",
				"aria-label": t("maskIs"), onpointerdown: down, onpointermove: go, onlostpointercapture: () => s.masked() }),
			h("i.brush", { "--x": `${100 * x}%`, "--y": `${100 * y}%`, "--at": `${100 * brush.size}%` })),
		h("div.actions", { key: "tools" },
			range("brush", brush.size, [0.03, , 0.5], 0.01, (size) => set({ size })),
			button("erase", () => set({ how: erases ? "source-over" : "destination-out" }), { "aria-pressed": erases }),
			button("undo", () => s.undo()), button("invert", all("xor")), button("wipe", all("destination-out")),
			button("closeUp", () => s.masked({ crop: crop ? 0 : 32 }), { "aria-pressed": Boolean(crop) }),
			button("done", () => s.paint(), { class: "main" })));
}

function meterView(s, run) {
	const said = sentence(run.said);
	return h("div.actions.meter", { key: "meter" },
		h("progress", { "aria-label": runName(run), max: 1, value: shareOf(run) }),
		h("span.said", said), button("stop", () => s.stop(run), keyed("stop")));
}

const KEYS = { generate: "Control+Enter", stop: "Escape", prompt: "/", history: "← →", paint: "P", again: "V",
	startFrom: "E", compare: "C", recall: "R", save: "S", keep: "F", remove: "Delete" };
const keyed = (name) => ({ title: `${t(name)} (${KEYS[name]})`, "aria-keyshortcuts": KEYS[name] });

function actionsView(s, { star }) {
	const act = (name, props) => button(name, () => s[name](), { ...keyed(name), ...props });
	const sign = (name, props) => small(name, name, () => s[name](), { ...keyed(name), ...props });
	return h("div.actions", { key: "actions" }, act("again", { class: "main" }), act("startFrom"), act("compare"),
		act("save"), sign("keep", { class: star ? "on" : "", "aria-pressed": Boolean(star) }), sign("remove"));
}

function compareView(s, edit = true) {
	const c = s.comparing;
	if (!c) return null;
	const title = (name, value) => name && (isNaN(value) ? value : `${t(name).toLowerCase()} ${number(value)}`);
	const axis = (which, other, names) => {
		const name = c[which];
		const free = names.filter((one) => !one || one !== c[other]);
		const pick = (to) => { c[which] = to; s.touch(); };
		const write = ({ target }) => { c.text[name] = target.value; s.touch(); };
		return [select(which, name, free, pick, { key: which, "aria-label": `${t("vary")} (${which})` }),
			name && [dim(t("over")), h("input", { key: name, name, value: c.text[name], oninput: write,
				"aria-label": `${t("over")} (${which})`, "aria-invalid": !s.values(name) })]];
	};
	const cell = ({ x, y, run }) => {
		const [picture] = run.made;
		const src = picture ? s.url(picture) : run.previews[0];
		return h("td", h("button.cell", { disabled: !picture, "aria-pressed": Boolean(picture) && picture.id === s.chosen,
			"aria-label": [title(c.x, x), title(c.y, y)].filter(Boolean).join(", "), onclick: () => s.pick(picture) },
		src && h("img", { alt: "", src, class: picture ? "" : "preview" }), run.trouble));
	};
	const of = c.cells.length;
	const tiles = (i) => c.cells.slice(i * c.xs.length, (i + 1) * c.xs.length).map(cell);
	const row = (y, i) => h("tr", h("th", { scope: "row" }, title(c.y, y)), tiles(i));
	const made = c.cells.filter(({ run }) => run.made.length).length;
	const n = edit && (s.values(c.x)?.length ?? 0) * (s.values(c.y)?.length ?? 0);
	return card("compare", {},
		edit && h("form.row.axes", { onsubmit: done(() => s.fill()) }, dim(t("vary")),
			axis("x", "y", s.axes), dim(t("and")), axis("y", "x", ["", ...s.axes]),
			h("button.main", { type: "submit" }, t("make", { n })),
			small("close", "x", () => s.endCompare())),
		h("div.scroll", { tabindex: 0 }, h("table",
			h("caption", t("grid", c.form), of > 0 && ` · ${t("made", { n: made, of })}`),
			of > 0 && h("thead", h("tr", h("td"), c.xs.map((x) => h("th", { scope: "col" }, title(c.x, x))))),
			h("tbody", c.ys.map(row)))));
}

function historyView(s) {
	const { items } = s;
	const option = (item) => {
		const { id, request, star, receipt } = item;
		const [src, name] = request ? [Object.values(item.previews)[0], runName(item)] : [s.url(item), receipt.prompt];
		return h("li", { key: id, role: "option", title: name, "aria-selected": id === s.chosen,
			tabindex: id === s.chosen ? 0 : -1, onclick: () => { s.choose(id); s.focusOn(CHOSEN); } },
		src && h("img", { alt: "", src }), star && icon("keep"),
		request && h("i.ring", { "--at": `${100 * shareOf(item)}%` }));
	};
	return card("history", { hidden: !items.length },
		h("div.row", h("h2", t("history")), dim(s.pictures.length), SPACE,
			s.pictures[1] && link("clear", () => s.remove(...s.pictures))),
		h("ul.tiles", { role: "listbox", "aria-label": t("history") }, items.map(option)));
}

function factList(facts) {
	const fact = ([key, value]) => {
		const parts = [value].flat().filter((one) => one || one === 0);
		const said = parts.map((one) => (one.toFixed ? number(one) : one)).join("; ");
		return said && h("div", { key, class: `fact-${key} ${said.length > 16 ? "wide" : ""}` },
			h("dt", t(key)), h("dd", value.tag ? value : said));
	};
	return h("dl", Object.entries(facts).map(fact));
}

function receiptView(s) {
	const picture = s.shown = s.picture ?? s.shown;
	if (!picture) return null;
	const { receipt: r, seconds } = picture;
	const { address } = s.engine;
	const copy = async (kind) => {
		s.copied = copyAs(kind, r, s.limits, address);
		try { await navigator.clipboard.writeText(s.copied); } catch { return s.focusOn("copied"); }
		s.copied = "";
		return s.say(t("copied"));
	};
	const facts = { seed: link(r.seed, () => s.set({ seed: r.seed }), { title: t("useSeed") }),
		size: `${r.width} × ${r.height}`,
		steps: r.stepsAsked > r.steps ? `${r.steps} / ${r.stepsAsked}` : r.steps, guidance: r.guidanceScale,
		temperature: r.temperature, strength: r.strength, negative: r.negativePrompt, lora: r.loraAlias,
		sampler: r.scheduler, model: last(r.model),
		time: seconds && t("seconds", { n: seconds }),
		mask: r.maskSha256?.slice(0, 8), closeUp: r.paddingMaskCrop && `${r.paddingMaskCrop} px`,
		notes: r.corrections };
	const kinds = [address && !r.strength && "link", address && "curl", "python", "json"];
	return card("receipt", { class: `card receipt ${s.picture ? "" : "old"}` },
		h("h2", t("receipt")), h("p", r.prompt), factList(facts),
		h("div.row", button("recall", () => s.recall(picture), keyed("recall")), h("div.row", dim(t("copy")),
			kinds.map((kind) => kind && link(kind, () => copy(kind)))), address && r.strength && dim(t("noLink"))),
		s.copied && h("textarea", { name: "copied", key: "copied", readonly: true, "aria-label": t("copy"),
			value: s.copied, onfocus: (e) => e.target.select() }));
}

const SHOWN = "status reason advice url model device loras scheduler precision queue version memory optimizations "
	+ "warnings lately";

function engineFacts(health) {
	const { device, gpuName, queue, memory } = health;
	const gib = (bytes) => t("gib", { n: bytes / 2 ** 30 });
	const said = { ...health, status: t(health.status), device: gpuName ?? device,
		queue: queue && t("queueIs", queue),
		memory: memory && [gib(memory.rss), memory.gpu && `GPU ${gib(memory.gpu)}`] };
	return Object.fromEntries(SHOWN.split(" ").map((name) => [name, said[name]]));
}

function stepChart(costs = {}) {
	const rows = Object.entries(costs).map(([n, seconds]) => [n, Math.round(1000 * seconds)]);
	const most = Math.max(...Object.values(costs)) * 1000;
	return rows[0] && h("figure", h("figcaption", t("stepCost")),
		h("div.chart", { role: "img", "aria-label": rows.map((row) => row.join(": ")).join(", ") },
			rows.map(([n, ms]) => h("div", ms, h("i", { "--at": `${(44 * ms) / most}px` }), n))));
}

function engineView(s, always) {
	if (!always && !s.panel) return null;
	const { mode, seen } = s.engine;
	const one = ([name, health]) => h("div", { key: name }, h("h2", { "data-state": health.status }, DOT, " ", t(name)),
		factList(engineFacts(health)), stepChart(health.stepCost));
	return card("engine", {},
		mode && radios("which", mode, ["local", "cloud", "auto"].map((name) => [name, t(name)]),
			(to) => s.engine.put("mode", to)),
		h("div.engines", Object.entries(seen).map(one)),
		!always && h("p.dim", Object.keys(KEYS).map((name) => `${KEYS[name]}: ${t(name)}`).join(" · ")));
}

function noteView(s) {
	const { note, runs: [run] } = s;
	const { step, steps, until } = run?.said ?? {};
	const worth = run && !until && (!step || step === 1 || step === steps);
	if (worth || !run) s.heard = run ? sentence(run.said) : s.finished;
	return h("div", h("div.hidden", { role: "status" }, note?.text ?? s.heard),
		note && h("div.note", note.text, note.undo && link("undo", note.undo)));
}

const VIEWS = {
	studio: (s) => [headView(s), engineView(s),
		h("div.body", composerView(s), stageView(s), compareView(s), historyView(s),
		receiptView(s)), noteView(s)],
	engine: (s) => [headView(s), engineView(s, true)],
	compare: (s) => [compareView(s, false), receiptView(s), noteView(s)],
};

// ---- hosts
export const systemDark = () => matchMedia("(prefers-color-scheme: dark)").matches;

function actionOf(e, s, target) {
	const { key } = e;
	const control = e.ctrlKey || e.metaKey;
	const arrow = ARROWS[key];
	const inList = target.matches("[role=option]");
	if (key === "Enter" && control) return () => s.generate();
	if (key === "Escape" && s.painting) return () => s.paint();
	if (key === "Escape") return s.runs[0] ? () => s.stop() : s.comparing && (() => s.endCompare());
	if (target.matches("input:not([type=radio], [type=range]), textarea, select")) return null;
	if (key === "z" && control && s.painting) return () => s.undo();
	if (control || e.altKey) return null;
	if (target.matches("canvas")) {
		if (arrow) return () => { s.brush.at = s.brush.at.map((at, i) => clamp(at + arrow[i] / 25, 0, 1)); s.touch(); };
		if (key === " ") return () => { s.stroke(); s.masked(); };
	}
	const way = { Home: -1e6, End: 1e6 }[key] ?? (arrow && sum(arrow));
	if (inList && way) return () => { s.move(way); s.focusOn(CHOSEN); };
	if (key === "/") return () => s.focusOn("prompt");
	const pressed = key.replace("Backspace", "Delete").toLowerCase();
	const name = Object.keys(KEYS).find((one) => KEYS[one].toLowerCase() === pressed);
	if (!(name === "paint" ? s.start && s.limits.mask : name && s.picture)) return null;
	return () => { s[name](); if (inList && name === "remove") s.focusOn(CHOSEN); };
}

/** Show one of the VIEWS. Returns what ends it. */
export function mount(host, s, { styles, isDark = systemDark, view = "studio" }) {
	const root = host.shadowRoot ?? host.attachShadow({ mode: "open" });
	const sheet = new CSSStyleSheet();
	sheet.replaceSync(styles);
	root.adoptedStyleSheets = [sheet];
	const el = Object.assign(document.createElement("div"), { className: `aura ${view}` });
	el.dataset.drop = t("drop");
	root.replaceChildren(el);

	const draw = () => {
		const focused = root.activeElement;
		patch(el, VIEWS[view](s).filter(Boolean));
		const mask = root.querySelector("canvas");
		if (mask) drawMask(mask, s.start, "#7c3aed");
		const { focus } = s;
		if (focus && (s.view ?? root) === root) {
			s.focus = null;
			root.querySelector(focus === CHOSEN ? CHOSEN : `[name="${focus}"]`)?.focus();
		} else if (focused && !root.activeElement) root.querySelector("[name=prompt], button")?.focus();
	};
	// Twice a second: the host's theme and the countdowns.
	const look = () => {
		host.toggleAttribute("data-dark", isDark());
		if (s.runs.some(({ said }) => said.until)) draw();
	};
	const tick = setInterval(look, 500);
	s.addEventListener("change", draw);

	const take = (e, { files }) => { if (files.length && view === "studio") done(() => s.take(files[0]))(e); };
	const over = (e) => {
		if (e.dataTransfer.types.includes("Files")) e.preventDefault();
		el.classList.toggle("over", e.type === "dragover" && view === "studio");
		if (e.type === "drop") take(e, e.dataTransfer);
	};
	Object.assign(el, {
		onkeydown: (e) => {
			s.view = root;
			const act = !e.isComposing && !e.defaultPrevented && actionOf(e, s, e.target);
			if (act) { e.stopPropagation(); done(act)(e); }
		},
		onpointerdown: () => { s.view = root; },
		onpaste: (e) => take(e, e.clipboardData),
		ondragover: over, ondragleave: over, ondrop: over,
	});
	look();
	draw();
	return () => { clearInterval(tick); s.removeEventListener("change", draw); };
}
