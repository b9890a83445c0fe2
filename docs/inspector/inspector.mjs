// The inspector page: shows what the JavaScript reader finds in a repository. Licence: Apache-2.0.

import {
  MANIFEST,
  address,
  blobs,
  openManifest,
  openPayload,
  storageNames,
  toNumbers,
} from "../../readers/javascript/tqformat.mjs";

// ------------------------------------------------------------------------------------------------ HTML

/** An element with attributes and children; text is never taken for markup. */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children.flat(Infinity));
  return element;
}

/** A table from its column heads and rows of cells; the first cell heads its row, numbers are texts in { number }. */
function table(heads, rows) {
  const head = heads.map((text) => {
    if (text === "") return h("td"); // over bars and over the heads of rows
    return h("th", { scope: "col", ...(text.number !== undefined && { class: "number" }) }, show(text));
  });
  const body = rows.map(([first, ...cells]) => h("tr", {}, h("th", { scope: "row" }, show(first)), cells.map(cell)));
  return h("div", { class: "wide" }, h("table", {}, h("thead", {}, h("tr", {}, head)), h("tbody", {}, body)));
}

function show(value) {
  return value.number ?? value;
}

function cell(value) {
  if (value instanceof HTMLTableCellElement) return value;
  return h("td", value.number === undefined ? {} : { class: "number" }, show(value));
}

function bar(share) {
  const line = h("div");
  line.style.width = `${100 * share}%`;
  return h("td", { class: "bar", "aria-hidden": "true" }, line);
}

function facts(entries) {
  const known = entries.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return h(
    "dl",
    {},
    known.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]),
  );
}

function section(title, ...children) {
  return h("section", {}, h("h2", {}, title), ...children);
}

/** A section whose contents are made, and what they need is fetched, when it is opened for the first time. */
function closedSection(title, make) {
  const place = h("div");
  const details = h("details", {}, h("summary", {}, h("h2", {}, title)), place);
  let made = null;
  details.addEventListener("toggle", () => {
    made ??= attempt(async () => place.replaceChildren(...[await make()].flat())).then((done) => {
      if (!done) made = null; // opened again, it tries again
    });
  });
  return details;
}

const status = document.getElementById("status");
const report = document.getElementById("report");

function tell(text, bad = false) {
  status.textContent = text;
  status.classList.toggle("bad", bad);
}

/** Runs what a button asks for, and says whether that worked; a failure is told and does not reach the console alone. */
async function attempt(work) {
  try {
    await work();
    return true;
  } catch (error) {
    tell(error.message, true);
    return false;
  }
}

// ------------------------------------------------------------------------------------------------ numbers

const integer = new Intl.NumberFormat("en");

function count(n) {
  return { number: integer.format(n) };
}

function size(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  const unit = bytes < 1e6 ? ["kB", 1e3] : bytes < 1e9 ? ["MB", 1e6] : ["GB", 1e9];
  return `${(bytes / unit[1]).toPrecision(3)} ${unit[0]}`;
}

function fixed(value, digits) {
  return { number: value.toFixed(digits) };
}

/** Bytes of all payload tensors that belong to a weight alone. */
function storedBytes(repository, weight) {
  return storageNames(weight).reduce((sum, name) => sum + repository.payload.get(name).bytes, 0);
}

// ------------------------------------------------------------------------------------------------ sections

function summary({ manifest }) {
  const { base_model: base, quantization, accounting, files } = manifest;
  const scalars = accounting.quantized_scalars + accounting.passthrough_scalars;
  const download = [...files.values()].reduce((sum, file) => sum + file.size, 0);
  return section(
    base.id,
    facts([
      ["Method", `${quantization.method}, ${quantization.bits} bits`],
      [
        "Stored",
        `${size(accounting.stored_bytes)} for ${size(accounting.original_bytes)}, ${accounting.ratio.toFixed(2)} : 1`,
      ],
      [
        "Bits a weight",
        `${((8 * accounting.stored_bytes) / scalars).toFixed(3)}, of ${integer.format(scalars)} weights`,
      ],
      ["All files", `${size(download)} in ${files.size} files and the manifest`],
      ["Tensors", `${accounting.quantized_tensors} quantized, ${accounting.passthrough_tensors} as they were`],
      ["Rotation", quantization.rotation],
      ["Seed", quantization.seed === null ? null : String(quantization.seed)],
      ["Licence", base.license],
      ["Revision", base.revision],
      ["Loads as", manifest.loader_kind],
      ["Optional parts", manifest.features.join(", ") || "none"],
      ["Written by", `${manifest.generator}, format ${manifest.format_version}`],
    ]),
  );
}

/** Weights by the first number in their names, which is the layer's; others by what stands before `.weight`. */
function bitsByLayer(repository) {
  const layers = new Map();
  for (const [name, weight] of repository.manifest.tensors) {
    const number = /(?:^|\.)([0-9]+)\./.exec(name)?.[1];
    const key = number === undefined ? name.replace(/\.weight$/, "") : `layer ${number}`;
    const layer = layers.get(key) ?? { weights: 0, scalars: 0, bytes: 0 };
    layer.weights += 1;
    layer.scalars += weight.scalars;
    layer.bytes += storedBytes(repository, weight);
    layers.set(key, layer);
  }
  const bits = ({ bytes, scalars }) => (scalars ? (8 * bytes) / scalars : 0);
  const most = Math.max(...[...layers.values()].map(bits), 1);
  const rows = [...layers].map(([key, layer]) => [
    key,
    count(layer.weights),
    count(layer.scalars),
    { number: size(layer.bytes) },
    fixed(bits(layer), 3),
    bar(bits(layer) / most),
  ]);
  const heads = [
    "Part of the model",
    { number: "tensors" },
    { number: "weights" },
    { number: "stored" },
    { number: "bits a weight" },
    "",
  ];
  return table(heads, rows);
}

function storage(repository) {
  const { manifest, payload } = repository;
  const kinds = new Map(
    ["codes", "scales", "offsets", "column scales", "passthrough tensors"].map((kind) => [kind, 0]),
  );
  const add = (kind, name) => name !== null && kinds.set(kind, kinds.get(kind) + payload.get(name).bytes);
  for (const weight of manifest.tensors.values()) {
    if (weight.kind === "passthrough") {
      add("passthrough tensors", weight.data);
      continue;
    }
    for (const stage of weight.stages) {
      add("codes", stage.codes);
      for (const name of [stage.scales, stage.outer_scales]) add("scales", name);
      for (const name of [stage.offsets, stage.outer_offsets]) add("offsets", name);
    }
    add("column scales", weight.column_scale);
  }
  const total = manifest.accounting.stored_bytes;
  const weights = [...kinds.values()].reduce((sum, bytes) => sum + bytes, 0);
  kinds.set("codebooks and transforms", total - weights);
  const rows = [...kinds]
    .filter(([, bytes]) => bytes > 0)
    .map(([kind, bytes]) => [
      kind,
      count(bytes),
      { number: `${((100 * bytes) / total).toFixed(2)} %` },
      bar(bytes / total),
    ]);
  return table(["Stored data", { number: "bytes" }, { number: "share" }, ""], rows);
}

const EVALUATION = "eval_summary.json";

/** The figures of the evaluation. Whatever is wrong with them says nothing of the weights: it is told in their place. */
async function evaluation(repository) {
  const listed = repository.manifest.files.get(EVALUATION);
  if (!listed) return h("p", { class: "quiet" }, `No ${EVALUATION} is listed.`);
  try {
    if (listed.size > 2 ** 24) throw new Error(`${EVALUATION} is longer than 16 MiB`); // [TQ-EVAL-1]
    return figures(JSON.parse(new TextDecoder().decode(await repository.read(EVALUATION))));
  } catch (error) {
    return h("p", { class: "bad" }, error.message);
  }
}

function figures(found) {
  const { base, quantized, kl_divergence: kl, top1_agreement: agreement, dataset, settings } = found;
  const rows = [
    ["Perplexity of the base model", fixed(base.perplexity, 3)],
    ["Perplexity of this model", fixed(quantized.perplexity, 3)],
    ["Their ratio", fixed(found.perplexity_ratio, 4)],
    ["KL divergence, mean", kl ? { number: kl.mean.toPrecision(4) } : { number: "not measured" }],
    ["Positions where both prefer the same token", { number: `${(100 * agreement.rate).toFixed(2)} %` }],
  ];
  const windows = `${found.windows} windows of at most ${settings.max_length} tokens`;
  const text = `On ${dataset.id}, ${windows}, as the publisher states it; the digest of the file is right.`;
  return [table(["Figure", { number: "value" }], rows), h("p", { class: "quiet" }, text)];
}

function digests(repository, source) {
  const marks = new Map();
  const rows = [...repository.manifest.files].map(([name, file]) => {
    const mark = h("td", { class: "quiet" }, "not verified");
    marks.set(name, mark);
    return [
      name,
      file.role,
      count(file.size),
      h("td", {}, h("code", { title: file.sha256 }, file.sha256.slice(0, 16), "…")),
      mark,
    ];
  });
  const total = [...repository.manifest.files.values()].reduce((sum, file) => sum + file.size, 0);
  const button = h("button", { type: "button" }, `Verify all files, ${size(total)}`);
  button.addEventListener("click", async () => {
    button.disabled = true;
    let done = 0;
    let wrong = 0;
    const onProgress = (bytes) => tell(`Verified ${size((done += bytes))} of ${size(total)}.`);
    for (const [name, mark] of marks) {
      try {
        if ((await source(name)) === null) {
          mark.textContent = "absent";
          continue;
        }
        await repository.verify([name], { onProgress });
        mark.textContent = "verified";
        mark.className = "good";
      } catch (error) {
        mark.textContent = error.message;
        mark.className = "bad";
        wrong += 1;
      }
    }
    tell(wrong ? `${wrong} files are not what the manifest says.` : `Digests verified: ${size(done)} read.`, wrong > 0);
    button.disabled = false;
  });
  return [h("p", {}, button), table(["File", "role", { number: "bytes" }, "SHA-256", "state"], rows)];
}

function weights(repository) {
  const select = h("select", { id: "weight" });
  for (const name of repository.manifest.tensors.keys()) select.append(h("option", {}, name));
  const button = h("button", { type: "button" }, "Decode");
  const place = h("div");
  select.addEventListener("change", () => place.replaceChildren(describe(repository, select.value)));
  button.addEventListener("click", () =>
    attempt(async () => {
      button.disabled = true;
      try {
        const name = select.value;
        const onProgress = (rows, of) =>
          tell(`Decoded ${integer.format(rows)} of ${integer.format(of)} rows of ${name}.`);
        const began = performance.now();
        const decoded = await repository.decode(name, { onProgress });
        const seconds = ((performance.now() - began) / 1000).toFixed(2);
        place.replaceChildren(describe(repository, name), ...values(decoded));
        tell(`Decoded ${name} in ${seconds} s.`);
      } finally {
        button.disabled = false;
      }
    }),
  );
  if (repository.manifest.tensors.size) place.replaceChildren(describe(repository, select.value));
  const label = h("label", { for: "weight" }, "Weight");
  return [h("p", {}, label, h("span", { class: "row" }, select, button)), place];
}

/** What the manifest and the headers say of a weight. */
function describe(repository, name) {
  const weight = repository.weight(name);
  const bytes = storedBytes(repository, weight);
  const list = facts([
    ["Name", name],
    ["Shape", `[${weight.shape.join(", ")}] ${weight.dtype}`],
    ["Stored", `${size(bytes)}, ${weight.scalars ? ((8 * bytes) / weight.scalars).toFixed(3) : 0} bits a weight`],
    ["Kind", weight.kind],
    ["Column scale", weight.column_scale],
  ]);
  if (weight.kind === "passthrough") return list;
  const rows = weight.stages.map((stage, i) => [
    `stage ${i}`,
    stage.window > stage.bits ? `${stage.bits}, window ${stage.window}` : String(stage.bits),
    `${stage.codebook.name}: ${stage.codebook.entries} entries of ${stage.codebook.dimension}`,
    `${stage.transform.name}: ${stage.transform.kind} ${stage.transform.size}`,
    String(stage.vector_length),
    stage.tile.join(" × "),
    [stage.scales, stage.outer_scales]
      .filter((key) => key !== null)
      .map((key) => repository.payload.get(key).dtype)
      .join(" × "),
  ]);
  return h("div", {}, list, table(["Stage", "bits", "codebook", "transform", "vector", "tile", "scales"], rows));
}

const BINS = 81;

/** Statistics, histogram and first values of a decoded weight. */
function values({ dtype, shape, bytes }) {
  const numbers = toNumbers(bytes, dtype);
  let low = Infinity;
  let high = -Infinity;
  let sum = 0;
  let squares = 0;
  let zeros = 0;
  let finite = 0;
  for (const x of numbers) {
    if (x === 0) zeros += 1;
    if (!Number.isFinite(x)) continue; // a passthrough tensor may hold some
    finite += 1;
    low = Math.min(low, x);
    high = Math.max(high, x);
    sum += x;
    squares += x * x;
  }
  const precise = (x) => (finite ? x.toPrecision(6) : "none");
  const list = facts([
    ["Range", `${precise(low)} to ${precise(high)}`],
    ["Mean", precise(sum / finite)],
    ["Root mean square", precise(Math.sqrt(squares / finite))],
    ["Zeros", integer.format(zeros)],
    ["Not finite", finite === numbers.length ? null : integer.format(numbers.length - finite)],
  ]);
  const cols = shape.length ? shape.at(-1) : 1;
  const rows = cols ? Math.min(8, numbers.length / cols) : 0;
  const first = Array.from({ length: rows }, (_, r) => [
    `row ${r}`,
    ...Array.from(numbers.subarray(r * cols, r * cols + Math.min(8, cols)), (x) => ({ number: x.toPrecision(4) })),
  ]);
  const heads = ["", ...Array.from({ length: Math.min(8, cols) }, (_, c) => ({ number: `column ${c}` }))];
  return [list, ...(finite ? [histogram(numbers, Math.max(-low, high))] : []), ...(rows ? [table(heads, first)] : [])];
}

function histogram(numbers, reach) {
  const bins = new Float64Array(BINS);
  for (const x of numbers) {
    if (Number.isFinite(x)) bins[Math.floor(((x + reach) / (2 * reach || 1)) * (BINS - 1) + 0.5)] += 1;
  }
  const most = Math.max(...bins);
  const label = `Histogram of the values from ${(-reach).toPrecision(3)} to ${reach.toPrecision(3)}`;
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  for (const [key, value] of Object.entries({ viewBox: `0 0 ${BINS} 100`, preserveAspectRatio: "none", role: "img" })) {
    svg.setAttribute(key, value);
  }
  svg.setAttribute("aria-label", label);
  bins.forEach((n, i) => {
    const rect = document.createElementNS(space, "rect");
    const height = (100 * n) / most;
    for (const [key, value] of Object.entries({ x: i, y: 100 - height, width: 0.9, height }))
      rect.setAttribute(key, value);
    svg.append(rect);
  });
  return h("figure", {}, svg, h("figcaption", { class: "quiet" }, label));
}

// ------------------------------------------------------------------------------------------------ opening

let latest = null; // what was asked to be opened last

async function open(source, name, fetched = () => "") {
  latest = source;
  report.replaceChildren();
  tell(`Opening ${name} …`);
  await attempt(async () => {
    const outline = await openManifest(source);
    if (latest !== source) return; // another was opened meanwhile
    let opened = null;
    async function whole() {
      opened ??= openPayload(source, outline).catch((error) => {
        opened = null; // asked again, it tries again
        throw error;
      });
      await opened;
      tell(`${name} obeys the format: manifest, headers and totals fit.${fetched()}`);
      return opened;
    }
    report.replaceChildren(
      summary(outline),
      closedSection("Bits by layer", async () => bitsByLayer(await whole())),
      closedSection("Storage", async () => storage(await whole())),
      closedSection("Evaluation", () => evaluation(outline)),
      closedSection("Digests", () => digests(outline, source)),
      closedSection("A weight", async () => weights(await whole())),
    );
    tell(`The manifest of ${name} obeys the format; sections are fetched when they are opened.${fetched()}`);
  });
}

/** The address of the files of what a user enters: an address, or owner/name on the Hub. */
function filesAddress(entered) {
  const hub = /^(?:https:\/\/huggingface\.co\/)?([\w.-]+\/[\w.-]+)\/?$/.exec(entered);
  return hub ? `https://huggingface.co/${hub[1]}/resolve/main` : new URL(entered, location.href).href;
}

function openAddress(entered) {
  let bytes = 0;
  const source = address(filesAddress(entered), { onBytes: (n) => (bytes += n) });
  return open(source, entered, () => ` ${integer.format(bytes)} bytes were fetched.`);
}

/** Files of the directory of the manifest, from a list with paths. */
function openFiles(files) {
  const paths = files.map((file) => [file.webkitRelativePath || file.name, file]);
  const manifest = paths.map(([path]) => path).find((path) => path === MANIFEST || path.endsWith(`/${MANIFEST}`));
  if (!manifest) return tell(`Among these ${files.length} files is no ${MANIFEST}.`, true);
  const folder = manifest.slice(0, -MANIFEST.length);
  const inside = paths
    .filter(([path]) => path.startsWith(folder))
    .map(([path, file]) => [path.slice(folder.length), file]);
  return open(blobs(new Map(inside)), folder.replace(/\/$/, "") || "The repository");
}

/** The files that were dropped, and those of a directory that was. */
async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry()).filter((entry) => entry !== null);
  const files = [];
  for (const entry of entries) {
    if (entry.isFile) files.push(entry);
    else {
      const reader = entry.createReader();
      for (let some; (some = await new Promise((done, failed) => reader.readEntries(done, failed))).length;)
        files.push(...some);
    }
  }
  return Promise.all(
    files.filter((entry) => entry.isFile).map((entry) => new Promise((done, failed) => entry.file(done, failed))),
  );
}

document.getElementById("open").addEventListener("submit", (event) => {
  event.preventDefault();
  const entered = document.getElementById("address").value.trim();
  if (entered) attempt(() => openAddress(entered));
});
document.getElementById("folder").addEventListener("change", (event) => {
  if (event.target.files.length) openFiles([...event.target.files]);
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", () => document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  attempt(async () => openFiles(await droppedFiles(event.dataTransfer)));
});

const asked = new URLSearchParams(location.search).get("repo");
if (asked) {
  document.getElementById("address").value = asked;
  attempt(() => openAddress(asked));
}
