// The page: controls, the drawing of images, their receipt, and the load of the server.

import { ApiError, bitmap, draw, metrics, models } from "./api.js";
import { Grid, Scrubber } from "./grid.js";

const $ = (id) => document.getElementById(id);
// Of a link, and of the controls.
const FIELDS = ["model", "label", "prompt", "negative", "n", "solver", "steps", "guidance", "seed"];
const MACHINE = ["backend", "dtype", "determinism", "version"]; // what bits depend on besides
const DIGITS = 16; // of each image's SHA-256 in a link
const scrubber = new Scrubber($("row"), $("row-value"));
const grid = new Grid($("grid"), scrubber);
const otherGrid = new Grid($("grid-other"), scrubber); // of the solver that is compared with
let rowSeconds = 0; // of a network row, as the server has measured
let known = [];
let running = null;

const model = () => known.find((m) => m.id === $("model").value);

function say(text) {
  $("status").textContent = text;
}

function complain(error) {
  $("message").hidden = !error;
  $("message").textContent = error ? error.message : "";
  if (error instanceof ApiError && error.status === 401) {
    $("key-row").hidden = false;
    $("key").focus();
  }
}

function options(select, entries) {
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
}

function fillModel() {
  const { classes, class_names: names, solvers, text } = model().fastdiff;
  $("class-row").hidden = text;
  $("prompt-row").hidden = !text;
  const labels = Array.from({ length: classes ?? 0 }, (_, i) => [String(i), names ? names[i] : `class ${i}`]);
  options($("label"), classes ? [...labels, ["all", "all classes in turns"]] : [["", "none"]]);
  if (classes) $("label").value = String(classes - 1);
  $("label").disabled = !classes;
  options($("solver"), [["auto", "auto"], ...solvers.map((s) => [s, s])]);
  $("solver").value = "unipc";
  options($("compare"), [["", "nothing"], ...solvers.map((s) => [s, s])]);
  fillTrade();
}

// The measured settings of the present guidance, from fast to good.
const front = () => model().fastdiff.measured.filter((p) => p.guidance === Number($("guidance").value));

function fillTrade() {
  const points = front();
  const all = model().fastdiff.measured;
  $("trade-row").hidden = !all.length;
  $("trade").disabled = !points.length;
  $("trade").max = Math.max(points.length - 1, 0);
  const at = points.findIndex((p) => p.solver === $("solver").value && p.steps === Number($("steps").value));
  if (at >= 0) $("trade").value = at;
  const known = [...new Set(all.map((p) => p.guidance))].join(", ");
  $("trade-text").textContent = points.length ? tradeText(at < 0 ? null : points[at]) : `Measured with guidance ${known} only.`;
}

function tradeText(point) {
  if (!point) return "The present setting was not measured.";
  const ms = 1000 * rowSeconds * point.nfe;
  const time = ms ? `, about ${ms.toFixed(0)} ms an image here` : "";
  return `Distance ${point.distance.toPrecision(3)} from real images, recall ${point.recall.toFixed(2)}, ${point.nfe} evaluations${time}.`;
}

// The request that the controls describe.
function request() {
  const n = Number($("n").value);
  const { classes } = model().fastdiff;
  const label = $("label").value;
  const body = {
    model: $("model").value,
    n,
    solver: $("solver").value,
    steps: Number($("steps").value),
    guidance: Number($("guidance").value),
    seed: Number($("seed").value),
  };
  if (model().fastdiff.text) {
    body.prompt = $("prompt").value;
    if ($("negative").value) body.negative = $("negative").value;
  } else if (label === "all") body.label = Array.from({ length: n }, (_, i) => i % classes);
  else if (label !== "") body.label = Number(label);
  return body;
}

function captions(body) {
  const names = model().fastdiff.class_names;
  return Array.from({ length: body.n }, (_, i) => {
    if (body.prompt) return `${body.prompt}, ${i + 1}`;
    const label = Array.isArray(body.label) ? body.label[i] : body.label;
    return label === undefined ? `index ${i}` : names ? names[label] : `class ${label}`;
  });
}

async function run(expected) {
  if (running) return;
  complain(null);
  const body = request();
  const compared = $("compare").value;
  running = new AbortController();
  $("receipt").hidden = true;
  $("draw").disabled = true;
  $("cancel").disabled = false;
  scrubber.start();
  for (const id of ["heading", "heading-other"]) $(id).hidden = !compared;
  $("heading").textContent = body.solver;
  $("heading-other").textContent = compared;
  say("Waiting for the first step.");
  if (matchMedia("(max-width: 50rem)").matches) $("result").scrollIntoView();
  const drawings = [into(grid, body)];
  if (compared) drawings.push(into(otherGrid, { ...body, solver: compared }));
  else otherGrid.start([], 1, 1);
  try {
    const receipts = await Promise.all(drawings);
    finish(body, receipts[0], expected);
    if (compared) ["heading", "heading-other"].forEach((id, i) => ($(id).textContent = cost(receipts[i])));
  } catch (error) {
    running.abort(); // the other drawing
    if (error.name === "AbortError") say("Cancelled: the server has dropped the job.");
    else {
      say("Nothing was drawn.");
      complain(error);
    }
  } finally {
    await Promise.allSettled(drawings);
    running = null;
    $("draw").disabled = false;
    $("cancel").disabled = true;
  }
}

const cost = (r) => `${r.solver}: ${r.nfe} network evaluations an image, ${r.run_ms.toFixed(0)} ms`;

// Draw into a grid; return the receipt.
async function into(target, body) {
  target.start(captions(body), model().fastdiff.width, model().fastdiff.height);
  const wanted = { ...body, stream: true, partial_images: Math.min(body.steps - 1, 24), response_format: "b64_json" };
  let rows = body.steps;
  let receipt = null;
  for await (const [kind, data] of draw(wanted, $("key").value, running.signal)) {
    const picture = await bitmap(data.b64_json);
    if (kind.endsWith("partial_image")) {
      rows = data.rows;
      target.add(data.image_index, data.row + 1, rows, picture);
      say("Drawing.");
    } else {
      target.add(data.image_index, rows, rows, picture);
      receipt = data.fastdiff ?? receipt;
    }
  }
  if (!receipt) throw new Error("The server has ended the stream before its end.");
  return receipt;
}

function finish(body, receipt, expected) {
  say(`Finished: ${receipt.n} images in ${receipt.total_ms.toFixed(0)} ms, of which ${receipt.queue_ms.toFixed(0)} ms in the queue.`);
  const bits = receipt.pixels_sha256.map((digest) => digest.slice(0, DIGITS));
  const link = new URLSearchParams();
  for (const field of FIELDS) link.set(field, $(field).value);
  for (const field of MACHINE) link.set(field, receipt[field]);
  link.set("bits", bits.join(","));
  $("permalink").href = `#${link}`;
  const facts = {
    solver: `${receipt.solver}, ${receipt.rows} rows`,
    "network evaluations": `${receipt.nfe} an image`,
    seed: receipt.seed,
    backend: `${receipt.backend}, ${receipt.dtype}`,
    determinism: receipt.determinism,
    "SHA-256 of the first image": receipt.pixels_sha256[0].slice(0, DIGITS),
  };
  $("facts").replaceChildren(
    ...Object.entries(facts).map(([name, value]) => {
      const row = document.createElement("div");
      const term = document.createElement("dt");
      const text = document.createElement("dd");
      term.textContent = name;
      text.textContent = value;
      row.append(term, text);
      return row;
    }),
  );
  $("verdict").textContent = expected ? compare(bits, receipt, expected) : "";
  $("verdict").className = !expected ? "" : $("verdict").textContent.startsWith("Identical") ? "same" : "other";
  $("receipt").hidden = false;
}

// Say whether the images are those of a link, and what is different.
function compare(bits, receipt, expected) {
  const wanted = (expected.get("bits") ?? "").split(",");
  const other = bits.map((b, i) => (b === wanted[i] ? 0 : i + 1)).filter(Boolean);
  if (!other.length && wanted.length === bits.length) return `Identical bits: all ${bits.length} images are those of the link.`;
  const machine = MACHINE.filter((field) => expected.get(field) !== String(receipt[field]));
  const why = machine.map((field) => `${field} was ${expected.get(field)} and is ${receipt[field]}`).join(", ");
  return `Different bits: image ${other.join(", ")} of ${bits.length}. ${why || "Backend and version are the same; the weights, the processor or the link may be others"}.`;
}

function describe() {
  if (!known.length) return;
  const body = request();
  const json = JSON.stringify(body).replaceAll("'", "'\\''");
  const key = $("key").value ? ` \\\n  -H 'authorization: Bearer KEY'` : "";
  $("curl").textContent =
    `curl ${location.origin}/v1/images/generations \\\n  -H 'content-type: application/json'${key} \\\n  -d '${json}'`;
  const { n, model: name, label, prompt, ...own } = body;
  const extra = label === undefined ? own : { label, ...own };
  $("python").textContent = `from openai import OpenAI

client = OpenAI(base_url="${location.origin}/v1", api_key="${$("key").value ? "KEY" : "none"}")
answer = client.images.generate(
    model=${JSON.stringify(name)}, prompt=${JSON.stringify(prompt ?? "")}, n=${n}, response_format="b64_json",
    extra_body=${JSON.stringify(extra)},
)`;
}

async function watch() {
  let last = null;
  for (;;) {
    try {
      const now = { ...(await metrics()), at: performance.now() };
      $("load-state").textContent = now.fastdiff_ready ? "ready" : "not ready";
      $("load-state").className = now.fastdiff_ready ? "ready" : "troubled";
      $("load-running").textContent = now.fastdiff_jobs_running ?? 0;
      $("load-waiting").textContent = now.fastdiff_jobs_waiting ?? 0;
      if (last) {
        const since = (name) => (now[name] ?? 0) - (last[name] ?? 0);
        const steps = since("fastdiff_step_rows_count");
        $("load-rows").textContent = steps ? (since("fastdiff_step_rows_sum") / steps).toFixed(1) : "–";
        const speed = (1000 * since("fastdiff_image_steps_total")) / (now.at - last.at);
        $("load-speed").textContent = Math.max(speed, 0).toFixed(0);
      }
      rowSeconds = now.fastdiff_step_rows_sum ? now.fastdiff_step_duration_seconds_sum / now.fastdiff_step_rows_sum : 0;
      last = now;
    } catch {
      $("load-state").textContent = "no answer";
      $("load-state").className = "troubled";
      last = null;
    }
    await new Promise((resolve) => setTimeout(resolve, document.hidden ? 5000 : 1000));
  }
}

async function load() {
  known = await models($("key").value);
  if (!known.length) throw new Error("The models are being loaded; this page tries again.");
  options($("model"), known.map((m) => [m.id, m.id]));
  fillModel();
  describe();
}

// Draw what the link in the address describes, and compare the bits.
function follow() {
  const link = new URLSearchParams(location.hash.slice(1));
  if (!known.length || !link.has("bits")) return;
  if (!known.some((m) => m.id === link.get("model"))) {
    complain(new Error(`The link is of the model ${link.get("model")}, which this server does not have.`));
    return;
  }
  $("model").value = link.get("model");
  fillModel();
  for (const field of FIELDS.slice(1)) $(field).value = link.get(field) ?? "";
  for (const name of ["guidance", "n"]) $(`${name}-value`).value = $(name).value;
  fillTrade();
  describe();
  run(link);
}

async function begin() {
  for (;;) {
    try {
      await load();
      complain(null);
      break;
    } catch (error) {
      complain(error);
      if (error instanceof ApiError && error.status === 401) {
        await new Promise((resolve) => $("key").addEventListener("change", resolve, { once: true }));
      } else await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
  document.body.dataset.loaded = "yes";
  follow();
}

$("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  history.replaceState(null, "", location.pathname);
  if (known.length) run(null);
});
$("controls").addEventListener("input", (event) => {
  for (const name of ["guidance", "n"]) $(`${name}-value`).value = $(name).value;
  if (event.target === $("trade") && front().length) {
    const point = front()[Number($("trade").value)];
    $("solver").value = point.solver;
    $("steps").value = point.steps;
  }
  fillTrade();
  describe();
});
$("model").addEventListener("change", () => {
  fillModel();
  describe();
});
$("dice").addEventListener("click", () => {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  describe();
});
$("cancel").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const source = $(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.textContent);
      say("Copied.");
    } catch {
      getSelection().selectAllChildren(source);
      say("Selected: copy it with the keyboard.");
    }
  });
}
addEventListener("hashchange", follow);
begin();
watch();
