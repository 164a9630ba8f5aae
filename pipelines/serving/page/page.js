// The page: asks for pictures as jobs, follows their events, and keeps what was drawn in this browser alone.

const at = (id) => document.getElementById(id);
const TRIES = 6; // of a stream that breaks
const KEPT = 100; // jobs in this browser
const OWN = "own";
let key = sessionStorage.getItem("key") || "";
let facts = null;
const unfinished = []; // cards of jobs that were being drawn when the page was left

// ---------------------------------------------------------------------------------------------------------------------
// The server

class Refusal extends Error {
  constructor(status, error, wait) {
    super(error.message);
    Object.assign(this, { status, code: error.code, param: error.param, wait });
  }
}

async function call(path, options = {}) {
  const headers = { authorization: `Bearer ${key}`, ...options.headers };
  if (options.body) headers["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, { message: "the server cannot be reached", code: "unreachable" });
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  throw new Refusal(answer.status, told.error || { message: "no answer", code: "unknown" }, answer.headers.get("retry-after"));
}

// Why there is no picture, for a person. What a check found is not known here, and need not be.
function inWords(problem) {
  const words = {
    moderation_blocked: "The safety checks refused this. Nothing was drawn; try to say it in another way.",
    safety_unavailable: "A safety check did not work, so nothing is shown. Try again later.",
    provenance_unavailable: "The picture could not be marked as generated, so it is not shown. Try again later.",
    audit_unavailable: "The server cannot keep its records, so it draws nothing at the moment.",
    queue_full: `Too many pictures are waiting. Try again in ${problem.wait || "some"} seconds.`,
    insufficient_quota: "Your key has used up what it may draw for now.",
    deadline_exceeded: "It took too long. Try fewer steps, fewer pictures or a smaller size.",
    worker_lost: "The process that drew it ended. Try again.",
    unreachable: "The server cannot be reached. Check the connection and try again.",
    not_found: "The server no longer knows this picture.",
    internal_error: "The server failed. Try again, and tell its owner if it stays so.",
  };
  const field = problem.param && problem.param !== "prompt" ? `${problem.param}: ` : "";
  return words[problem.code] || `${field}${problem.message}`;
}

// Events of a job from number `after` on. A stream that ends without the job's last event is taken up again.
async function* events(id, signal) {
  let after = 0;
  for (let tries = 0; tries < TRIES; ) {
    try {
      const answer = await call(`/v1/jobs/${id}/events?after=${after}`, { signal });
      for await (const event of parsed(answer.body)) {
        tries = 0;
        after = event.number || after;
        yield event;
        if (["job.succeeded", "job.failed", "job.cancelled"].includes(event.type)) return;
      }
    } catch (error) {
      if (error.name === "AbortError" || (error instanceof Refusal && error.status >= 400 && error.status < 500)) throw error;
    }
    tries += 1;
    await new Promise((done) => setTimeout(done, 300 * 2 ** tries));
  }
  throw new Refusal(0, { message: "the server cannot be reached", code: "unreachable" });
}

async function* parsed(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const field = (name) => block.split("\n").find((line) => line.startsWith(`${name}: `))?.slice(name.length + 2);
        if (field("data")) yield { ...JSON.parse(field("data")), number: Number(field("id")) };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// What this browser keeps

const store = new Promise((done) => {
  const asked = indexedDB.open("lidit", 1);
  asked.onupgradeneeded = () => asked.result.createObjectStore("jobs", { keyPath: "id" });
  asked.onsuccess = () => done(asked.result);
  asked.onerror = () => done(null); // a private window: nothing is kept
});

async function kept(mode, act) {
  const database = await store;
  if (!database) return [];
  return new Promise((done) => {
    const request = act(database.transaction("jobs", mode).objectStore("jobs"));
    request.onsuccess = () => done(request.result);
    request.onerror = () => done([]);
  });
}

async function keep(job) {
  await kept("readwrite", (jobs) => jobs.put(job));
  const all = (await kept("readonly", (jobs) => jobs.getAll())).sort((a, b) => b.created - a.created);
  for (const old of all.slice(KEPT)) await kept("readwrite", (jobs) => jobs.delete(old.id));
}

// ---------------------------------------------------------------------------------------------------------------------
// Cards

class Card {
  constructor(job) {
    this.job = job;
    this.element = at("card").content.firstElementChild.cloneNode(true);
    this.part = (name) => this.element.querySelector(`.${name}`);
    const { prompt, size, steps, guidance_scale: guidance, n } = job.asked;
    this.element.setAttribute("aria-label", prompt);
    this.part("words").textContent = prompt;
    this.part("facts").textContent = `${size.replace("x", " × ")} · ${steps} steps · guidance ${guidance}`;
    this.frames = Array.from({ length: n }, () => {
      const frame = document.createElement("div");
      frame.className = "frame coming";
      const [width, height] = size.split("x").map(Number);
      frame.style.aspectRatio = `${width} / ${height}`;
      this.part("frames").append(frame);
      return frame;
    });
    this.part("frames").classList.toggle("few", n > 1 && n < 5);
    this.part("cancel").onclick = () => this.cancel();
    this.part("another").onclick = () => {
      const { seed, ...settings } = this.job.asked;
      send(settings);
    };
    this.part("again").onclick = () => reuse(this.job);
    this.part("program").onclick = () => showCode(this.job);
    this.part("forget").onclick = () => this.remove();
    at("list").prepend(this.element);
    shownOrNot();
  }

  // blob: of a picture or a preview
  show(index, blob, final, seed) {
    const frame = this.frames[index];
    const image = document.createElement("img");
    image.alt = final ? `${this.job.asked.prompt}, seed ${seed}` : "preview";
    image.src = URL.createObjectURL(blob);
    image.onload = () => image.classList.toggle("small", image.naturalWidth < 160);
    if (!final) return frame.replaceChildren(image);
    frame.classList.remove("coming");
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-label", `Enlarge picture ${index + 1}`);
    button.append(image);
    button.onclick = () => {
      at("viewed").src = image.src;
      at("viewed").alt = image.alt;
      at("viewed").classList.toggle("small", image.naturalWidth < 160);
      at("viewer").showModal();
    };
    const save = document.createElement("a");
    save.href = image.src;
    save.download = `lidit-${seed}.${this.job.asked.output_format}`;
    save.textContent = "Save";
    save.setAttribute("aria-label", `Save picture ${index + 1}`);
    return frame.replaceChildren(button, save);
  }

  state(text, done, total) {
    this.part("state").textContent = text;
    const bar = this.element.querySelector("progress");
    bar.hidden = !text;
    bar.setAttribute("aria-label", "Progress");
    if (total) Object.assign(bar, { max: total, value: done });
    else bar.removeAttribute("value");
  }

  // lasting: the server may still be drawing it, so a page that is loaded again asks once more
  // refused: the same words would be refused again
  end(problem, { calm = false, lasting = false, refused = false } = {}) {
    this.state("");
    if (this.job.open && !lasting) {
      delete this.job.open;
      kept("readwrite", (jobs) => jobs.delete(this.job.id)); // what was drawn is kept anew, by its pictures
    }
    this.part("cancel").hidden = true;
    const drawn = this.job.pictures.length > 0;
    for (const name of ["again", "forget"]) this.part(name).hidden = false;
    this.part("another").hidden = refused;
    this.part("another").textContent = drawn ? "Draw another" : "Try again";
    this.part("program").hidden = !drawn;
    this.element.classList.toggle("bare", !drawn);
    for (const frame of this.frames.filter((one) => one.classList.contains("coming"))) frame.remove();
    this.part("problem").hidden = !problem;
    this.part("problem").textContent = problem || "";
    this.part("problem").classList.toggle("calm", calm);
  }

  async cancel() {
    this.part("cancel").disabled = true;
    await call(`/v1/jobs/${this.job.id}`, { method: "DELETE" }).catch((error) => this.end(inWords(error), { lasting: error.code === "unreachable" }));
  }

  async remove() {
    await kept("readwrite", (jobs) => jobs.delete(this.job.id));
    this.element.remove();
    shownOrNot();
  }

  async follow() {
    const { job } = this;
    const taken = this.frames.map(() => 0);
    this.part("cancel").hidden = false;
    this.state("Sent");
    try {
      for await (const event of events(job.id)) {
        if (event.type === "job.queued") this.state(event.position ? `${event.position} before yours` : "Next in line");
        else if (event.type === "job.accepted") this.state("Reading the words");
        else if (event.type === "job.step") {
          taken[event.image] = event.step;
          this.state(`Step ${Math.min(...taken)} of ${event.steps}`, taken.reduce((a, b) => a + b), event.steps * taken.length);
        } else if (event.type === "image_generation.partial_image") this.show(event.image_index, blobOf(event), false);
        else if (event.type === "image_generation.completed") {
          const blob = blobOf(event);
          job.pictures[event.image_index] = { blob, seed: event.seed };
          this.show(event.image_index, blob, true, event.seed);
        } else if (event.type === "job.succeeded") {
          this.end();
          say("Picture ready");
          this.facts();
          await keep(job);
        } else if (event.type === "job.cancelled") this.end("Cancelled.", { calm: true });
        else if (event.type === "job.failed") {
          this.end(inWords(event.error), { refused: event.error.code === "moderation_blocked" });
        }
      }
    } catch (error) {
      this.end(inWords(error), { lasting: error.code === "unreachable" });
    }
  }

  facts() {
    const seeds = this.job.pictures.map((picture) => picture.seed).join(", ");
    this.part("facts").textContent += ` · seed ${seeds}`;
  }
}

function blobOf(event) {
  const bytes = Uint8Array.from(atob(event.b64_json), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: `image/${event.output_format}` });
}

function shownOrNot() {
  const empty = !at("list").childElementCount;
  at("nothing").hidden = !empty;
  at("clear").hidden = empty;
}

const say = (text) => { at("said").textContent = text; };

// ---------------------------------------------------------------------------------------------------------------------
// The form

function asked() {
  const size = at("size").value === OWN ? `${at("width").value}x${at("height").value}` : at("size").value;
  const body = {
    prompt: at("prompt").value,
    size,
    n: Number(at("count").value),
    steps: Number(at("steps").value),
    guidance_scale: Number(at("guidance").value),
    output_format: at("format").value,
  };
  if (at("negative").value) body.negative_prompt = at("negative").value;
  if (at("seed").value) body.seed = Number(at("seed").value);
  return body;
}

function draw(event) {
  event.preventDefault();
  return send(asked());
}

async function send(body) {
  at("draw-problem").hidden = true;
  at("draw").disabled = true;
  try {
    // Should the answer be lost, the same words under the same name are not drawn twice.
    const name = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
    const ask = () => call("/v1/jobs", {
      method: "POST",
      body: JSON.stringify({ ...body, partial_images: 3 }),
      headers: { "idempotency-key": name },
    });
    const answer = await ask().catch((error) => (error.code === "unreachable" ? ask() : Promise.reject(error)));
    const { id } = await answer.json();
    const job = { id, asked: body, created: Date.now(), pictures: [], open: true };
    await keep(job); // a page that is loaded again takes it up
    new Card(job).follow();
  } catch (error) {
    if (error.status === 401) return askKey(inWords(error));
    at("draw-problem").textContent = inWords(error);
    at("draw-problem").hidden = false;
  } finally {
    at("draw").disabled = false;
  }
  return undefined;
}

function reuse({ asked: settings, pictures }) {
  at("prompt").value = settings.prompt;
  const known = [...at("size").options].some((option) => option.value === settings.size);
  at("size").value = known ? settings.size : OWN;
  [at("width").value, at("height").value] = settings.size.split("x");
  at("count").value = settings.n;
  at("steps").value = settings.steps;
  at("guidance").value = settings.guidance_scale;
  at("format").value = settings.output_format;
  at("negative").value = settings.negative_prompt ?? "";
  at("seed").value = pictures[0]?.seed ?? settings.seed ?? "";
  at("more").open = true;
  showValues();
  at("prompt").focus();
}

function showValues() {
  at("steps-shown").textContent = at("steps").value;
  at("guidance-shown").textContent = Number(at("guidance").value) === 1 ? "none" : at("guidance").value;
  at("own-size").hidden = at("size").value !== OWN;
  for (const side of ["width", "height"]) at(side).required = at("size").value === OWN;
}

function showCode({ asked: settings, pictures }) {
  const { prompt, size, n, output_format: format, ...extra } = { ...settings, seed: pictures[0]?.seed ?? settings.seed };
  const body = JSON.stringify({ prompt, size, n, output_format: format, ...extra });
  const quoted = body.replaceAll("'", "'\\''");
  const curl = `curl ${location.origin}/v1/images/generations \\\n  -H "Authorization: Bearer $LIDIT_KEY" \\\n`
    + `  -H 'Content-Type: application/json' \\\n  -d '${quoted}'`;
  const python = "import base64, os\nfrom openai import OpenAI\n\n"
    + `client = OpenAI(base_url="${location.origin}/v1", api_key=os.environ["LIDIT_KEY"])\n`
    + `answer = client.images.generate(\n    prompt=${JSON.stringify(prompt)}, size="${size}", n=${n}, output_format="${format}",\n`
    + `    extra_body=${JSON.stringify(extra)},\n)\n`
    + `for number, image in enumerate(answer.data):\n    with open(f"picture-{number}.${format}", "wb") as file:\n`
    + "        file.write(base64.b64decode(image.b64_json))";
  const choose = (text, button) => {
    at("snippet").textContent = text;
    for (const id of ["as-curl", "as-python"]) at(id).setAttribute("aria-pressed", String(id === button));
  };
  at("as-curl").onclick = () => choose(curl, "as-curl");
  at("as-python").onclick = () => choose(python, "as-python");
  choose(curl, "as-curl");
  at("code").showModal();
}

async function copy() {
  const text = at("snippet").textContent;
  try {
    await navigator.clipboard.writeText(text);
    say("Copied");
    at("copy").textContent = "Copied";
    setTimeout(() => { at("copy").textContent = "Copy"; }, 1500);
  } catch {
    getSelection().selectAllChildren(at("snippet")); // no clipboard without https: ready for Ctrl-C
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The start

function sizes({ size, multiple }) {
  const [width, height] = size.split("x").map(Number);
  const near = (value) => Math.max(multiple, Math.round(value / multiple) * multiple);
  const offered = [[width, height, "as trained"], [near(width * 0.75), height, "upright"], [width, near(height * 0.75), "wide"]];
  const options = offered
    .filter(([w, h], place) => offered.findIndex(([a, b]) => a === w && b === h) === place)
    .map(([w, h, name]) => new Option(`${w} × ${h}, ${name}`, `${w}x${h}`));
  at("size").replaceChildren(...options, new Option("another size", OWN));
  for (const [id, value] of [["width", width], ["height", height]]) Object.assign(at(id), { value, step: multiple, min: multiple });
}

function askKey(problem) {
  at("key-form").hidden = false;
  for (const id of ["draw-form", "pictures", "key-change"]) at(id).hidden = true;
  at("key-problem").hidden = !problem;
  at("key-problem").textContent = problem || "";
  at("key").value = "";
  at("key").focus();
}

async function enter() {
  try {
    [facts] = (await (await call("/v1/models")).json()).data;
  } catch (error) {
    askKey(error.status === 401 ? "This key is not known, or is no longer valid." : inWords(error));
    return;
  }
  sessionStorage.setItem("key", key);
  at("key-form").hidden = true;
  for (const id of ["draw-form", "pictures", "key-change"]) at(id).hidden = false;
  for (const card of unfinished.splice(0)) card.follow();
  at("model").textContent = facts.id;
  at("count").max = facts.limits.n;
  Object.assign(at("steps"), { max: Math.min(facts.limits.steps, Math.max(50, 2 * facts.steps)), value: facts.steps });
  at("guidance").value = facts.guidance_scale;
  sizes(facts);
  showValues();
  at("prompt").focus();
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value.trim();
  enter();
});
at("key-change").onclick = () => {
  sessionStorage.removeItem("key");
  key = "";
  askKey();
};
at("draw-form").addEventListener("submit", draw);
at("draw-form").addEventListener("input", showValues);
at("draw-form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("draw-form").requestSubmit();
});
for (const example of at("examples").children) {
  example.onclick = () => {
    at("prompt").value = example.textContent;
    at("draw-form").requestSubmit();
  };
}
at("copy").onclick = copy;
at("clear").onclick = async () => {
  await kept("readwrite", (jobs) => jobs.clear());
  for (const card of [...at("list").children]) if (card.querySelector(".cancel").hidden) card.remove();
  shownOrNot();
};

for (const job of (await kept("readonly", (jobs) => jobs.getAll())).sort((a, b) => a.created - b.created)) {
  const card = new Card(job);
  if (job.open) {
    unfinished.push(card); // followed as soon as there is a key
    continue;
  }
  job.pictures.forEach(({ blob, seed }, index) => card.show(index, blob, true, seed));
  card.facts();
  card.end();
}
if (key) enter();
else askKey();
