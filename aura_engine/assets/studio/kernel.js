// The widget of a notebook: a Studio whose engine is in the kernel. Python joins this to studio.js.
import { Studio, Trouble, mount, newId, pictureFrom, sleep, systemDark, t } from "./studio.js";

class WidgetEngine {
	talks = new Map();
	ended = false;
	constructor(model) {
		this.model = model;
		this.store = new KernelStore(this);
		model.on("msg:custom", (message, [bytes] = []) => {
			const blob = bytes && new Blob([bytes], { type: message.mime });
			this.talks.get(message.id)?.({ ...message, blob });
		});
	}

	get address() { return this.model.get("address") || undefined; }
	get seen() { return this.model.get("engines"); }
	get mode() { return this.model.get("mode"); }
	put(name, value) { this.model.set(name, value); this.model.save_changes(); }
	async examples() { return this.model.get("examples"); }
	get key() { return this.model.get("keyed"); }
	useKey(key) { this.model.send({ type: "key", key }); }
	async health() {
		return this.ended ? { status: "ended", reason: t("kernelEnded") } : this.model.get("health");
	}

	/** Send a message, read what comes back. */
	async* talk({ id = newId(), ...message }, { buffers = [], signal } = {}) {
		const { readable, writable } = new TransformStream();
		const [reader, writer] = [readable.getReader(), writable.getWriter()];
		const put = (item) => { writer.write(item); };
		const busy = setTimeout(() => put({ type: "waits", say: "waitKernel" }), 1500);
		signal?.addEventListener("abort", () => put({ error: signal.reason }));
		this.talks.set(id, put);
		this.model.send({ id, ...message }, undefined, buffers);
		try {
			for (;;) {
				const { value: event } = await reader.read();
				if (event.error) throw event.error;
				if (event.type !== "waits") clearTimeout(busy);
				if (event.type === "end") return;
				if (event.type === "failed") throw Trouble.from(event.problem, { over: true });
				if (event.type !== "accepted") yield event;
				if (event.type === "done") return;
			}
		} finally {
			clearTimeout(busy);
			this.talks.delete(id);
		}
	}

	/** Ask, because a kernel that was restarted says nothing by itself. */
	async hello(seconds = 3) {
		const answer = this.talk({ type: "hello" }).next().then(() => true, () => false);
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

class KernelStore {
	constructor(engine) { Object.assign(this, { engine, model: engine.model }); }

	async all(table) {
		if (table === "jobs") return this.model.get("jobs");
		const found = [];
		if (table === "pictures") {
			for await (const event of this.engine.talk({ type: "history" })) if (event.blob) found.push(pictureFrom(event));
		}
		return found;
	}

	put(table, { id, star }) { if (table === "pictures") this.model.send({ type: "put", picture: id, star }); }
	remove(table, ids) {
		if (table === "pictures") ids.forEach((picture) => this.model.send({ type: "remove", picture }));
	}

	form() { return this.model.get("value"); }
	keepForm(form) { this.engine.put("value", { ...form }); }
}

/** Another view of this kernel picked a picture, or deleted one. */
function follow(s, event) {
	s.pictures = s.pictures.filter(({ id }) => id !== event.picture);
	if (event.blob) s.pictures.unshift(pictureFrom(event));
	if (s.picture || s.running) s.touch();
	else s.choose(s.pictures[0]?.id);
}

/** The comparison that Python makes. */
function show(s, { jobs = [], form, xs, ys, ...axes }) {
	const cell = (job, i) => ({ x: xs[i % xs.length], y: ys[Math.floor(i / xs.length)],
		run: s.make({ job, aside: true, request: { body: form } }) });
	s.comparing = jobs[0] && { ...axes, form, xs, ys, text: {}, cells: jobs.map(cell) };
	s.comparing?.cells.forEach(({ run }) => s.follow(run));
	s.touch();
}

function isDark() {
	const both = [document.body, document.documentElement];
	const said = (name) => both.map((el) => el.getAttribute(name)).find(Boolean);
	const light = said("data-jp-theme-light");
	if (light) return light === "false";
	const theme = said("data-vscode-theme-kind") ?? said("data-theme")
		?? both.map(({ className }) => className).find((name) => /\bdark\b/.test(name));
	return theme ? /dark|high-contrast$/.test(theme) : systemDark();
}

export default function widget() {
	let s;
	return {
		initialize({ model }) {
			const engine = new WidgetEngine(model);
			const get = (name) => model.get(name);
			s = new Studio(engine);
			engine.talks.set("album", (event) => follow(s, event));
			s.addEventListener("choice", () => { if (s.picture && get("choice") !== s.chosen) engine.put("choice", s.chosen); });
			const changes = {
				value: () => { Object.assign(s.form, get("value")); s.touch(); },
				choice: () => { if (get("choice") !== s.chosen && s.find(get("choice"))) s.choose(get("choice")); },
				examples: () => s.touch({ examples: get("examples") }),
				jobs: async () => (await s.store.all("jobs")).forEach((job) => s.pickUp(job)),
				table: () => show(s, get("table")),
			};
			for (const [name, run] of Object.entries(changes)) model.on(`change:${name}`, run);
			model.on("change:health change:engines change:mode", () => s.look());
			model.on("comm_live_update", () => engine.hello());
			if (get("view") === "studio") s.begin();
			s.look();
			show(s, get("table") ?? {});
		},
		render({ model, el }) {
			// Or Lab takes our letters for its own.
			el.setAttribute("data-lm-suppress-shortcuts", "true");
			return mount(el, s, { styles: model.get("styles"), view: model.get("view"), isDark });
		},
	};
}
