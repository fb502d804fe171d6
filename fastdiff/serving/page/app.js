// The page: controls, the drawing of images, their receipt, and the load of the server.

import { ApiError, bitmap, draw, metrics, models } from "./api.js";
import { Grid } from "./grid.js";

const $ = (id) => document.getElementById(id);
const FIELDS = ["model", "label", "n", "solver", "steps", "guidance", "seed"]; // of a link, and of the controls
const MACHINE = ["backend", "dtype", "determinism", "version"]; // what bits depend on besides
const DIGITS = 16; // of each image's SHA-256 in a link
const grid = new Grid($("grid"), $("row"), $("row-value"));
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
  const { classes, class_names: names, solvers } = model().fastdiff;
  const labels = Array.from({ length: classes ?? 0 }, (_, i) => [String(i), names ? names[i] : `class ${i}`]);
  options($("label"), classes ? [...labels, ["all", "all classes in turns"]] : [["", "none"]]);
  if (classes) $("label").value = String(classes - 1);
  $("label").disabled = !classes;
  options($("solver"), [["auto", "auto"], ...solvers.map((s) => [s, s])]);
  $("solver").value = "unipc";
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
  if (label === "all") body.label = Array.from({ length: n }, (_, i) => i % classes);
  else if (label !== "") body.label = Number(label);
  return body;
}

function captions(body) {
  const names = model().fastdiff.class_names;
  return Array.from({ length: body.n }, (_, i) => {
    const label = Array.isArray(body.label) ? body.label[i] : body.label;
    return label === undefined ? `index ${i}` : names ? names[label] : `class ${label}`;
  });
}

async function run(expected) {
  if (running) return;
  complain(null);
  const body = request();
  const previews = Math.min(body.steps - 1, 24);
  $("receipt").hidden = true;
  grid.start(captions(body), model().fastdiff.width, model().fastdiff.height);
  running = new AbortController();
  $("draw").disabled = true;
  $("cancel").disabled = false;
  say("Waiting for the first step.");
  if (matchMedia("(max-width: 50rem)").matches) $("result").scrollIntoView();
  try {
    for await (const [kind, data] of draw(
      { ...body, stream: true, partial_images: previews, response_format: "b64_json" },
      $("key").value,
      running.signal,
    )) {
      const picture = await bitmap(data.b64_json);
      if (kind.endsWith("partial_image")) {
        grid.add(data.image_index, data.row + 1, data.rows, picture);
        say("Drawing.");
      } else {
        const rows = Number($("row").max) || body.steps;
        grid.add(data.image_index, Math.max(rows, 1), Math.max(rows, 1), picture);
        if (data.fastdiff) finish(body, data.fastdiff, expected);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") say("Cancelled: the server has dropped the job.");
    else {
      say("Nothing was drawn.");
      complain(error);
    }
  } finally {
    running = null;
    $("draw").disabled = false;
    $("cancel").disabled = true;
  }
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
  const json = JSON.stringify(body);
  const key = $("key").value ? ` \\\n  -H 'authorization: Bearer KEY'` : "";
  $("curl").textContent =
    `curl ${location.origin}/v1/images/generations \\\n  -H 'content-type: application/json'${key} \\\n  -d '${json}'`;
  const { n, model: name, label, ...own } = body;
  const extra = label === undefined ? own : { label, ...own };
  $("python").textContent = `from openai import OpenAI

client = OpenAI(base_url="${location.origin}/v1", api_key="${$("key").value ? "KEY" : "none"}")
answer = client.images.generate(
    model=${JSON.stringify(name)}, prompt="", n=${n}, response_format="b64_json",
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
$("controls").addEventListener("input", () => {
  for (const name of ["guidance", "n"]) $(`${name}-value`).value = $(name).value;
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
