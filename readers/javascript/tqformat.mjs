// Read tqformat 1.0 repositories: low-bit model weights that anybody can check and decode. Licence: Apache-2.0.
//
// Written from SPEC.md, in its order; the numbers of its rules stand above the lines that obey them. One module without
// dependencies, for browsers and for Node 20 or newer:
//
//   import { directory, openRepository } from "./tqformat.mjs";
//
//   const repository = await openRepository(directory("model-4bit"));
//   await repository.verify();                                                       // the digests of the payload
//   const { dtype, shape, bytes } = await repository.decode("model.embed_tokens.weight");
//
// It runs no code of a repository. Input that breaks a rule throws TQFormatError, which says which and where.

/** Input that SPEC.md forbids, or that this reader cannot hold: a stable code and the place [TQ-ERR-1]. */
export class TQFormatError extends Error {
  constructor(code, where, message) {
    super(`[${code}] ${where}: ${message}`);
    Object.assign(this, { name: "TQFormatError", code, where });
  }
}

function fail(code, where, message) {
  throw new TQFormatError(code, where, message);
}

function check(condition, code, where, message) {
  if (!condition) fail(code, where, message);
}

// ------------------------------------------------------------------------------------------------ 2 Repository
//
// Where files come from: a source is a function that takes a file name and resolves to null, where there is no such
// file, or to { size, read(offset, length) }; read resolves to a Uint8Array of that length. It is never asked for more
// than the file has, and reads no more than it is asked for.

export const MANIFEST = "quant_manifest.json";
const MANIFEST_SIZE = 2 ** 26; // bytes that it has at most [TQ-LIM-1]
const ROLES = ["payload", "support", "code", "document"];

/** A directory on disk, in Node. With `links`, links to regular files are followed, as the Hub's cache needs it. */
export function directory(path, { links = false } = {}) {
  return async (name) => {
    const fs = await import("node:fs/promises");
    const place = `${path}/${name}`;
    let found;
    try {
      found = await (links ? fs.stat(place) : fs.lstat(place));
    } catch (error) {
      if (error.code === "ENOENT") return null;
      throw error;
    }
    check(found.isFile(), "PATH.TYPE", name, "expected a regular file"); // [TQ-REPO-1]
    async function read(offset, length) {
      const bytes = allocate(length, Uint8Array, name);
      const file = await fs.open(place);
      try {
        for (let done = 0; done < length;) {
          const { bytesRead } = await file.read(bytes, done, length - done, offset + done);
          check(bytesRead > 0, "BIND.SIZE", name, "the file ended while it was read");
          done += bytesRead;
        }
      } finally {
        await file.close();
      }
      return bytes;
    }
    return { size: found.size, read };
  };
}

/** Files that the user chose or dropped in a browser, or other blobs: a map from file name to Blob. */
export function blobs(files) {
  return async (name) => {
    const blob = files.get(name);
    const read = async (offset, length) => new Uint8Array(await blob.slice(offset, offset + length).arrayBuffer());
    return blob ? { size: blob.size, read } : null;
  };
}

const PROBE = 16384; // bytes that the first request for a file asks for, to learn its size

/** Files below an address, by HTTP ranges. `onBytes(count)` hears of each answer. */
export function address(base, { onBytes = () => {} } = {}) {
  const root = base.endsWith("/") ? base : `${base}/`;
  async function range(name, offset, length) {
    const abort = new AbortController();
    const headers = { Range: `bytes=${offset}-${offset + length - 1}` };
    const answer = await fetch(root + encodeURIComponent(name), { headers, signal: abort.signal });
    const size = Number(/\/([0-9]+)$/.exec(answer.headers.get("content-range") ?? "")?.[1] ?? NaN);
    if (answer.status === 206 && !Number.isNaN(size)) {
      const bytes = new Uint8Array(await answer.arrayBuffer());
      onBytes(bytes.length);
      return { size, bytes };
    }
    abort.abort(); // or the whole file would follow
    if (answer.status === 404) return null;
    if (answer.status === 416 && size === 0) return { size, bytes: new Uint8Array(0) };
    const missing = answer.status === 206 ? "the header Content-Range" : "status 206, an answer to a range";
    throw new Error(`${name}: expected ${missing}, got status ${answer.status}`);
  }
  /** The manifest, which is read whole: without a range, so that browsers let servers compress it to a tenth. */
  async function whole(name) {
    const answer = await fetch(root + encodeURIComponent(name));
    if (answer.status === 404) return null;
    if (!answer.ok) throw new Error(`${name}: status ${answer.status}`);
    const reader = answer.body.getReader();
    const parts = [];
    let size = 0;
    for (let next; size <= MANIFEST_SIZE && !(next = await reader.read()).done; size += next.value.length) {
      parts.push(next.value);
    }
    if (size > MANIFEST_SIZE) await reader.cancel();
    onBytes(Number(answer.headers.get("content-length")) || size); // the former counts what was sent
    return blobs(new Map([[name, new Blob(parts)]]))(name);
  }
  return async (name) => {
    if (name === MANIFEST) return whole(name);
    const head = await range(name, 0, PROBE);
    if (head === null) return null;
    async function read(offset, length) {
      const known = head.bytes.slice(offset, offset + length);
      if (known.length === length) return known;
      const rest = await range(name, offset + known.length, length - known.length);
      const same = rest?.size === head.size && rest.bytes.length === length - known.length;
      check(same, "BIND.SIZE", name, "the file changed while it was read");
      const bytes = allocate(length, Uint8Array, name);
      bytes.set(known);
      bytes.set(rest.bytes, known.length);
      return bytes;
    }
    return { size: head.size, read };
  };
}

function allocate(length, Type, where) {
  try {
    return new Type(length);
  } catch {
    return fail("LIMIT.MEMORY", where, `no memory for ${length} elements`); // [TQ-LIM-1]
  }
}

// [TQ-REPO-2]
const FILE_NAME = /^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$/;
const RESERVED = /^(quant_manifest\.json|readme\.md|__pycache__|(con|prn|aux|nul|com[1-9]|lpt[1-9])(\..*)?|.*\.)$/i;

function checkFileNames(names) {
  const lower = new Set();
  for (const name of names) {
    const where = `files['${name}']`;
    check(FILE_NAME.test(name) && !RESERVED.test(name), "PATH.NAME", where, "not a plain file name");
    check(!lower.has(name.toLowerCase()), "PATH.COLLISION", where, "differs from another name only in case");
    lower.add(name.toLowerCase());
  }
}

// ------------------------------------------------------------------------------------------------ 3 JSON
//
// A parser of one's own: JSON.parse merges repeated keys and takes 2.0 for 2. Objects become Maps, so that `__proto__`
// is a key like any other; integers become numbers, other numbers Float.

class Float {
  constructor(value) {
    this.value = value;
  }
}

const DEPTH = 64;
const PLAIN = /[^"\\\u0000-\u001f]*/y;
const ESCAPE = /\\(?:u([0-9a-fA-F]{4})|(["\\/bfnrt]))/y;
const ESCAPED = { '"': '"', "\\": "\\", "/": "/", b: "\b", f: "\f", n: "\n", r: "\r", t: "\t" };
const NUMBER = /-?(?:0|[1-9][0-9]*)((?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)/y;
const WORD = /true|false|null/y;

/** The Map of a JSON text. A `header` begins at once and ends in spaces only; `onRepeat(key, level)` may throw. */
export function parseJson(bytes, where, { header = false, onRepeat = () => {} } = {}) {
  let text;
  let at = 0;
  // [TQ-JSON-1]
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    fail("JSON.ENCODING", where, "not UTF-8");
  }
  check(!text.startsWith("\ufeff"), "JSON.ENCODING", where, "begins with a byte order mark");

  function wrong(message, code = "JSON.SYNTAX") {
    fail(code, where, `${message} at character ${at}`);
  }
  function match(pattern) {
    pattern.lastIndex = at;
    const found = pattern.exec(text);
    if (found) at += found[0].length;
    return found;
  }
  function space() {
    for (let c; (c = text.charCodeAt(at)), c === 32 || c === 10 || c === 13 || c === 9;) at += 1;
  }
  function string() {
    at += 1;
    let result = match(PLAIN)[0];
    if (text[at] !== '"') {
      while (text[at] !== '"') {
        const escape = match(ESCAPE) ?? wrong("expected a closing quote or an escape");
        result += escape[1] ? String.fromCharCode(parseInt(escape[1], 16)) : ESCAPED[escape[2]];
        result += match(PLAIN)[0];
      }
      // [TQ-JSON-1]
      if (/\p{Surrogate}/u.test(result)) wrong("lone surrogate in the string that ends", "JSON.ENCODING");
    }
    at += 1;
    return result;
  }
  function number() {
    const found = match(NUMBER) ?? wrong("expected a value");
    const value = Number(found[0]);
    // [TQ-JSON-4]
    if (found[1] === "") {
      if (!Number.isSafeInteger(value)) wrong("integer beyond 2^53 - 1 that ends", "JSON.NUMBER");
      return value + 0; // -0 is 0
    }
    if (!Number.isFinite(value)) wrong("number that is not finite, and ends", "JSON.NUMBER");
    return new Float(value);
  }
  function items(close, level, item) {
    if (level > DEPTH) wrong(`nested deeper than ${DEPTH} levels`, "JSON.DEPTH"); // [TQ-JSON-5]
    at += 1;
    space();
    if (text[at] === close) {
      at += 1;
      return;
    }
    for (;;) {
      item();
      space();
      at += 1;
      if (text[at - 1] === close) return;
      if (text[at - 1] !== ",") wrong(`expected , or ${close} before the one`);
      space();
    }
  }
  function value(level) {
    if (text[at] === "{") {
      const object = new Map();
      items("}", level, () => {
        if (text[at] !== '"') wrong("expected a key");
        const key = string();
        space();
        if (text[at] !== ":") wrong("expected :");
        at += 1;
        space();
        // [TQ-JSON-3]
        if (object.has(key)) {
          onRepeat(key, level);
          wrong(`the key ${JSON.stringify(key)} a second time`, "JSON.DUPLICATE_KEY");
        }
        object.set(key, value(level + 1));
      });
      return object;
    }
    if (text[at] === "[") {
      const list = [];
      items("]", level, () => list.push(value(level + 1)));
      return list;
    }
    if (text[at] === '"') return string();
    const word = match(WORD);
    return word ? JSON.parse(word[0]) : number();
  }

  // [TQ-JSON-2, TQ-PAY-2]
  if (!header) space();
  if (text[at] !== "{") wrong("expected an object");
  const result = value(1);
  if (header) while (text[at] === " ") at += 1;
  else space();
  if (at !== text.length) wrong("expected the end");
  return result;
}

// ------------------------------------------------------------------------------------------------ 4 Manifest

// A type is a function of a JSON value and its place that returns what the value means, or fails [TQ-MAN-2].
function typed(test, expected) {
  return (value, where) => (test(value) ? value : fail("SCHEMA.TYPE", where, `expected ${expected}`));
}

const string = typed((value) => typeof value === "string", "a string");
const integer = typed((value) => typeof value === "number", "an integer");
const array = typed(Array.isArray, "a list");
const map = typed((value) => value instanceof Map, "an object");
const number = (value, where) => (value instanceof Float ? value.value : integer(value, where));
const list = (type) => (value, where) => array(value, where).map((item, i) => type(item, `${where}[${i}]`));
const orNull = (type) => (value, where) => (value === null ? null : type(value, where));

// The tables of the specification: key -> [type], or [type, default] where it may be left out.
const SHARED = { codebook: "codebooks", transform: "transforms" }; // keys of a stage, and the tables of their ids
const TOP = {
  format: [string],
  format_version: [string],
  features: [list(string)],
  generator: [string],
  base_model: [map],
  loader_kind: [string],
  pipeline_tag: [orNull(string), null],
  quantization: [map],
  files: [map],
  transforms: [map],
  codebooks: [map],
  tensors: [map],
  tied_weights: [map, new Map()],
  accounting: [map],
};
const BASE_MODEL = { id: [string], revision: [orNull(string), null], license: [orNull(string), null] };
const QUANTIZATION = {
  method: [string],
  bits: [number],
  seed: [orNull(integer), null],
  rotation: [orNull(string), null],
  vector_length: [orNull(integer), null],
  grid_size: [orNull(integer), null],
  iterations: [orNull(integer), null],
  scale_dtype: [orNull(string), null],
  include: [list(string), []],
  exclude: [list(string), []],
  protected_names: [list(string), []],
  protected_fragments: [list(string), []],
  protected_bits: [orNull(integer), null],
  allocation: [orNull(map), null],
  calibration: [orNull(map), null],
};
const ALLOCATION = { allocator: [string], target_bits: [orNull(number), null], candidate_bits: [list(number), []] };
const CALIBRATION = { source: [string], texts: [integer, 0], tokens: [integer, 0] };
const FILE = {
  role: [string],
  size: [integer],
  sha256: [string],
  chunk_size: [orNull(integer), null],
  chunks: [orNull(list(string)), null],
};
const WEIGHT = { kind: [string], shape: [list(integer)], dtype: [string] };
const WEIGHT_KINDS = {
  quantized: { effective_bits: [number], stages: [array], column_scale: [orNull(string), null] },
  passthrough: { data: [string] },
};
const STAGE = {
  bits: [integer],
  window: [orNull(integer), null],
  codebook: [string],
  transform: [string],
  vector_length: [orNull(integer), null],
  tile: [orNull(list(integer)), null],
  codes: [string],
  scales: [string],
  outer_scales: [orNull(string), null],
  offsets: [orNull(string), null],
  outer_offsets: [orNull(string), null],
};
const LOADER_KINDS = [
  "text-generation",
  "image-text-to-text",
  "text2text-generation",
  "automatic-speech-recognition",
  "fill-mask",
  "text-classification",
  "image-classification",
  "feature-extraction",
];

/** The optional parts of [TQ-VER-1], all of which this reader has. */
export const FEATURES = [
  "trellis",
  "vector_codebook",
  "row_codebook",
  "stages",
  "column_scale",
  "tiles",
  "offsets",
  "outer_scales",
  "fine_scales",
  "dense",
  "givens",
  "permutation",
];
const M20 = 2 ** 20;
const REAL = ["F16", "BF16", "F32"];
const SHORT = ["U8", "I8", "F8_E4M3", "F8_E8M0"];

/** An object of the manifest by its table, defaults filled in; `others` are the keys of other kinds. */
function readObject(value, where, table, others = {}) {
  const place = (key) => (where ? `${where}.${key}` : key);
  for (const key of map(value, where).keys()) {
    if (Object.hasOwn(table, key) || key === "extra") continue;
    // [TQ-MAN-1, TQ-MAN-6]
    const code = Object.hasOwn(others, key) ? "SCHEMA.AMBIGUOUS" : "SCHEMA.UNKNOWN_FIELD";
    fail(code, place(key), "this object has no such key");
  }
  const result = { extra: value.has("extra") ? map(value.get("extra"), place("extra")) : new Map() };
  for (const [key, [type, ...preset]] of Object.entries(table)) {
    if (value.has(key)) result[key] = type(value.get(key), place(key));
    else if (preset.length) result[key] = preset[0];
    else fail("SCHEMA.MISSING_FIELD", place(key), "required"); // [TQ-MAN-2]
  }
  return result;
}

/** The same for an object whose `kind` chooses one of the tables `kinds`. */
function readKind(value, where, common, kinds) {
  check(map(value, where).has("kind"), "SCHEMA.MISSING_FIELD", `${where}.kind`, "required");
  const kind = string(value.get("kind"), `${where}.kind`);
  checkValue(Object.hasOwn(kinds, kind), `${where}.kind`, `one of ${Object.keys(kinds).join(", ")}`);
  return readObject(value, where, { ...common, ...kinds[kind] }, Object.assign({}, ...Object.values(kinds)));
}

function checkValue(condition, where, expected) {
  check(condition, "SCHEMA.VALUE", where, `expected ${expected}`);
}

function checkRange(value, low, high, where) {
  checkValue(value >= low && value <= high, where, `${low} to ${high}, got ${value}`);
}

/** [TQ-MAN-4] for identifiers, weight names and storage names; a file name has a rule of its own. */
function isName(name) {
  const length = name.length > 512 ? [...name].length : name.length; // code points
  if (length < 1 || length > 512 || name === "__metadata__" || /[\u0000-\u001f\u007f]/.test(name)) return false;
  return !/^[/\\]/.test(name) && !name.split(/[/\\]/).includes("..");
}

function checkName(name, where) {
  checkValue(isName(name), where, "a name of 1 to 512 characters that is no path");
}

/** The product of a shape; Infinity where it times `size`, each 0 taken as 1, exceeds 2^53 - 1 [TQ-SEC-3]. */
function countScalars(shape, size) {
  // The product of integers is exact in binary64 up to 2^53, and what lies above is never rounded to below.
  const claimed = shape.reduce((product, n) => product * (n || 1), 1);
  if (!(claimed * size <= Number.MAX_SAFE_INTEGER)) return Infinity;
  return shape.includes(0) ? 0 : claimed;
}

/** The manifest as an object with the keys of the specification; maps stay Maps, and stages refer to their tables. */
function readManifest(bytes) {
  const root = parseJson(bytes, MANIFEST);
  // [TQ-MAN-3, TQ-VER-3, TQ-VER-4]
  check(root.get("format") === "tqformat", "SCHEMA.VERSION", "format", 'expected "tqformat"');
  const version = root.get("format_version");
  const readable = typeof version === "string" && /^1\.(0|[1-9][0-9]*)$/.test(version);
  check(readable, "SCHEMA.VERSION", "format_version", 'expected "1.0" or another 1.x');
  // [TQ-VER-2]
  check(root.has("features"), "SCHEMA.MISSING_FIELD", "features", "required");
  for (const feature of list(string)(root.get("features"), "features")) {
    check(FEATURES.includes(feature), "SCHEMA.UNKNOWN_FEATURE", "features", `this reader has no ${feature}`);
  }
  if (root.get("files") instanceof Map) checkFileNames(root.get("files").keys());

  const manifest = readObject(root, "", TOP);
  checkValue(new Set(manifest.features).size === manifest.features.length, "features", "each once");
  checkRange([...manifest.generator].length, 1, 512, "generator");
  // [TQ-MAN-5]
  checkValue(LOADER_KINDS.includes(manifest.loader_kind), "loader_kind", `one of ${LOADER_KINDS.join(", ")}`);
  manifest.base_model = readObject(manifest.base_model, "base_model", BASE_MODEL);
  const quantization = (manifest.quantization = readObject(manifest.quantization, "quantization", QUANTIZATION));
  for (const [key, table] of [
    ["allocation", ALLOCATION],
    ["calibration", CALIBRATION],
  ]) {
    if (quantization[key]) quantization[key] = readObject(quantization[key], `quantization.${key}`, table);
  }
  const readers = { files: readFile, transforms: readTransform, codebooks: readCodebook, tensors: readWeight };
  for (const key of [...Object.keys(readers), "tied_weights"]) {
    check(manifest[key].size <= M20, "LIMIT.SIZE", key, "expected at most 2^20 entries"); // [TQ-LIM-1]
  }
  for (const [key, read] of Object.entries(readers)) {
    const entries = new Map();
    for (const [name, value] of manifest[key]) {
      entries.set(name, { name, ...read(value, `${key}['${name}']`, name, manifest) });
    }
    manifest[key] = entries;
  }
  for (const [alias, name] of manifest.tied_weights) {
    checkName(alias, `tied_weights['${alias}']`);
    checkName(string(name, `tied_weights['${alias}']`), `tied_weights['${alias}']`);
  }
  manifest.accounting = readObject(manifest.accounting, "accounting", ACCOUNTING);
  for (const key in TOTALS) checkRange(manifest.accounting[key], 0, Infinity, `accounting.${key}`);
  checkUse(manifest);
  return manifest;
}

/** An entry of `files` [TQ-REPO-3, TQ-REPO-4, TQ-REPO-6, TQ-REPO-8]. */
function readFile(value, where, name) {
  const file = readObject(value, where, FILE);
  const digest = /^[0-9a-f]{64}$/;
  checkValue(ROLES.includes(file.role), `${where}.role`, `one of ${ROLES.join(", ")}`);
  checkValue(name !== "load_quantized.py" || file.role === "code", `${where}.role`, "code");
  checkRange(file.size, 0, Infinity, `${where}.size`);
  checkValue(digest.test(file.sha256), `${where}.sha256`, "64 lower-case hex digits");
  const both = (file.chunk_size === null) === (file.chunks === null);
  check(both, "SCHEMA.MISSING_FIELD", where, "chunk_size and chunks go together");
  if (file.chunks === null) return file;
  checkRange(file.chunk_size, 4096, Infinity, `${where}.chunk_size`);
  const count = Math.ceil(file.size / file.chunk_size);
  checkValue(count <= M20 && file.chunks.length === count, `${where}.chunks`, `${count} digests, at most 2^20`);
  file.chunks.forEach((hex, k) => checkValue(digest.test(hex), `${where}.chunks[${k}]`, "64 lower-case hex digits"));
  return file;
}

/** An entry of `tensors`. It gets `scalars` and, quantized, `rows`, `cols`, `tileRows`: the lcm of its stages' tr. */
function readWeight(value, where, name, manifest) {
  checkName(name, where);
  const weight = readKind(value, where, WEIGHT, WEIGHT_KINDS);
  const { kind, shape, dtype } = weight;
  // [TQ-MAN-7, TQ-PASS-1]
  checkValue(shape.length <= 8 && shape.every((n) => n >= 0), `${where}.shape`, "at most 8 integers from 0");
  checkValue(Object.hasOwn(ELEMENTS, dtype), `${where}.dtype`, "a dtype of TQ-PAY-4");
  weight.scalars = countScalars(shape, ELEMENTS[dtype].size);
  checkValue(weight.scalars < Infinity, `${where}.shape`, "at most 2^53 - 1 scalars and bytes");
  if (kind === "passthrough") {
    checkName(weight.data, `${where}.data`);
    return weight;
  }
  checkValue(REAL.includes(dtype), `${where}.dtype`, `one of ${REAL.join(", ")}`);
  checkRange(shape.length, 2, 8, `${where}.shape`);
  weight.cols = shape.at(-1);
  checkRange(weight.cols, 1, M20, `${where}.shape`);
  weight.rows = weight.scalars / weight.cols;
  if (weight.column_scale !== null) checkName(weight.column_scale, `${where}.column_scale`);
  checkRange(weight.stages.length, 1, 8, `${where}.stages`);
  weight.tileRows = 1;
  weight.stages = weight.stages.map((stage, i) => readStage(stage, `${where}.stages[${i}]`, weight, manifest));
  // [TQ-MAN-8]
  const bits = weight.stages.reduce((sum, stage) => sum + stage.bits / stage.codebook.dimension, 0);
  checkValue(Math.abs(weight.effective_bits - bits) <= 1e-6, `${where}.effective_bits`, bits);
  return weight;
}

/** One of `stages`, with the entries of its ids in their place. It gets `symbols` and `tileBytes` of a tile. */
function readStage(value, where, weight, manifest) {
  const stage = readObject(value, where, STAGE);
  for (const key of ["codes", "scales", "outer_scales", "offsets", "outer_offsets", "codebook", "transform"]) {
    if (stage[key] !== null) checkName(stage[key], `${where}.${key}`);
  }
  // [TQ-MAN-9]
  for (const [key, table] of Object.entries(SHARED)) {
    check(manifest[table].has(stage[key]), "SCHEMA.REFERENCE", `${where}.${key}`, "an id without an entry");
    stage[key] = manifest[table].get(stage[key]);
  }
  const { codebook, transform } = stage;
  const { rows, cols } = weight;
  const { bits } = stage;
  const p = codebook.dimension;
  const window = (stage.window ??= bits);
  const G = (stage.vector_length ??= cols);
  const [tr, tc] = (stage.tile ??= [1, cols]);
  // [TQ-CODE-1, TQ-BOOK-4]
  checkRange(bits, 1, Math.min(16, 8 * p), `${where}.bits`);
  checkRange(window, bits, 16, `${where}.window`);
  if (window > bits) checkValue(codebook.entries === 2 ** window, `${where}.codebook`, `${2 ** window} entries`);
  else checkValue(codebook.entries <= 2 ** bits, `${where}.codebook`, `at most ${2 ** bits} entries`);
  const ownRows = codebook.rows === null || codebook.rows === rows;
  checkValue(ownRows, `${where}.codebook`, `a codebook for ${rows} rows`); // [TQ-BOOK-3]
  // [TQ-CODE-2, TQ-NUM-1]
  checkValue(G >= 1 && G <= M20 && cols % G === 0 && G % p === 0, `${where}.vector_length`, "a divisor of cols");
  checkValue(stage.tile.length === 2 && tr >= 1 && tc >= 1, `${where}.tile`, "two numbers from 1");
  checkValue(rows % tr === 0 && cols % tc === 0 && tc % p === 0, `${where}.tile`, "divisors of rows and cols");
  weight.tileRows *= tr / greatestCommonDivisor(weight.tileRows, tr);
  checkValue(weight.tileRows * cols <= 2 ** 22, `${where}.tile`, "tile rows of at most 2^22 elements");
  stage.symbols = (tr * tc) / p;
  checkValue(stage.symbols * bits >= window, `${where}.window`, "no window longer than the stream of a tile");
  stage.tileBytes = Math.ceil((stage.symbols * bits) / 8); // [TQ-CODE-4]
  // [TQ-TRAN-1]
  const nested = G % transform.size === 0 || transform.size % G === 0;
  checkValue(nested && cols % transform.size === 0, `${where}.transform`, "a size that nests with G and divides cols");
  // [TQ-NUM-9]
  const complete = stage.offsets !== null || stage.outer_offsets === null;
  check(complete, "SCHEMA.MISSING_FIELD", `${where}.offsets`, "outer_offsets need offsets");
  return stage;
}

function greatestCommonDivisor(a, b) {
  return b === 0 ? a : greatestCommonDivisor(b, a % b);
}

/** [TQ-MAN-9] and [TQ-VER-1]: every table entry is named, and `features` are those in use. */
function checkUse(manifest) {
  const weights = [...manifest.tensors.values()].filter((weight) => weight.kind === "quantized");
  const stages = weights.flatMap((weight) => weight.stages);
  for (const [key, table] of Object.entries(SHARED)) {
    const named = new Set(stages.map((stage) => stage[key]));
    for (const [id, entry] of manifest[table]) {
      check(named.has(entry), "SCHEMA.REFERENCE", `${table}['${id}']`, "nothing names it");
    }
  }
  const inUse = {
    trellis: stages.some((stage) => stage.window > stage.bits),
    vector_codebook: stages.some((stage) => stage.codebook.dimension > 1),
    row_codebook: stages.some((stage) => stage.codebook.rows !== null),
    stages: weights.some((weight) => weight.stages.length > 1),
    column_scale: weights.some((weight) => weight.column_scale !== null),
    tiles: weights.some((weight) => weight.stages.some(({ tile }) => tile[0] !== 1 || tile[1] !== weight.cols)),
    offsets: stages.some((stage) => stage.offsets !== null),
    outer_scales: stages.some((stage) => stage.outer_scales !== null || stage.outer_offsets !== null),
    fine_scales: stages.some((stage) => stage.vector_length < stage.transform.size),
    dense: stages.some((stage) => stage.transform.kind === "dense"),
    givens: stages.some((stage) => stage.transform.kind === "givens"),
    permutation: stages.some((stage) => stage.transform.kind === "permutation"),
  };
  for (const feature of FEATURES) {
    const right = manifest.features.includes(feature) === inUse[feature];
    check(right, "SCHEMA.FEATURES", "features", `${feature} is ${inUse[feature] ? "" : "not "}in use`);
  }
}

// ------------------------------------------------------------------------------------------------ 5 Payload container

/** The tensors of a payload file by storage name: { dtype, shape, scalars, bytes, file, begin }, begin from byte 0. */
async function readContainer(name, file) {
  // [TQ-PAY-1]
  check(file.size >= 8, "CONTAINER.HEADER_LENGTH", name, "expected at least 8 bytes");
  const start = new DataView((await file.read(0, 8)).buffer);
  const length = start.getUint32(0, true) + 2 ** 32 * start.getUint32(4, true);
  const possible = length >= 2 && length <= 100_000_000 && 8 + length <= file.size;
  check(possible, "CONTAINER.HEADER_LENGTH", name, `a header of ${length} bytes is impossible`);
  // [TQ-PAY-2]
  const onRepeat = (key, level) =>
    check(level > 1 || key === "__metadata__", "CONTAINER.DUPLICATE_NAME", name, `${JSON.stringify(key)} occurs twice`);
  let header;
  try {
    header = parseJson(await file.read(8, length), name, { header: true, onRepeat });
  } catch (error) {
    if (error.code?.startsWith("JSON.")) fail("CONTAINER.HEADER", name, error.message);
    throw error;
  }
  const expect = (condition, key) =>
    check(condition, "CONTAINER.HEADER", name, `the entry ${JSON.stringify(key)} is malformed`);
  const isText = (value) => typeof value === "string";
  const isSizes = (value) => Array.isArray(value) && value.every((n) => typeof n === "number" && n >= 0);
  const metadata = header.get("__metadata__") ?? new Map();
  const valid = metadata instanceof Map && header.get("__metadata__") !== null && [...metadata.values()].every(isText);
  expect(valid, "__metadata__");
  header.delete("__metadata__");
  const tensors = new Map();
  for (const [key, value] of header) {
    // [TQ-PAY-3]
    expect(isName(key) && value instanceof Map && value.size === 3, key);
    const [dtype, shape, range] = ["dtype", "shape", "data_offsets"].map((field) => value.get(field));
    expect(isText(dtype) && isSizes(shape) && shape.length <= 8 && isSizes(range) && range.length === 2, key);
    // [TQ-PAY-4]
    check(Object.hasOwn(ELEMENTS, dtype), "CONTAINER.DTYPE", name, `${key}: unknown dtype ${JSON.stringify(dtype)}`);
    const { size } = ELEMENTS[dtype];
    const scalars = countScalars(shape, size);
    const bytes = range[1] - range[0];
    check(bytes === scalars * size, "CONTAINER.SHAPE", name, `${key}: shape, dtype and range disagree`);
    tensors.set(key, { dtype, shape, scalars, bytes, file, begin: 8 + length + range[0], name: key });
  }
  // [TQ-PAY-5, TQ-PAY-8]
  const filled = [...tensors.values()].filter((tensor) => tensor.bytes > 0).sort((a, b) => a.begin - b.begin);
  const ends = new Set([8 + length]);
  let end = 8 + length;
  for (const tensor of filled) {
    check(tensor.begin === end, "CONTAINER.OFFSETS", name, `${tensor.name}: a gap or an overlap`);
    end += tensor.bytes;
    ends.add(end);
  }
  check(end === file.size, "CONTAINER.OFFSETS", name, "the ranges do not end where the file does");
  for (const tensor of tensors.values()) {
    const apart = tensor.bytes > 0 || ends.has(tensor.begin);
    check(apart, "CONTAINER.OFFSETS", name, `${tensor.name}: begins inside another`);
  }
  for (const tensor of filled) {
    const aligned = tensor.begin % ELEMENTS[tensor.dtype].size === 0;
    check(aligned, "CONTAINER.ALIGNMENT", name, `${tensor.name}: begins at no multiple of its element size`);
  }
  return tensors;
}

/** What the manifest wants of the payload: { name, where, dtypes, shape }; a dimension is a number or a test. */
function* requirements(manifest, payload) {
  for (const [id, { kind, size, matrix, pairs, angles, index }] of manifest.transforms) {
    const where = `transforms['${id}']`;
    if (kind === "dense") yield { name: matrix, where, dtypes: REAL, shape: [size, size] };
    if (kind === "permutation") yield { name: index, where, dtypes: ["I32"], shape: [size] };
    if (kind === "givens") {
      const rounds = (n) => n >= 1 && n <= 64;
      const same = (n) => n === payload.get(pairs).shape[0];
      yield { name: pairs, where, dtypes: ["I32"], shape: [rounds, size / 2, 2] };
      yield { name: angles, where, dtypes: ["F32"], shape: [same, size / 2] };
    }
  }
  for (const [id, { tensor, rows, entries, dimension }] of manifest.codebooks) {
    const shape = rows === null ? [entries, dimension] : [rows, entries, dimension];
    if (tensor !== null) yield { name: tensor, where: `codebooks['${id}']`, dtypes: REAL, shape };
  }
  for (const [name, weight] of manifest.tensors) {
    const where = `tensors['${name}']`;
    const { rows, cols } = weight;
    if (weight.kind === "passthrough") {
      yield { name: weight.data, where: `${where}.data`, dtypes: [weight.dtype], shape: weight.shape };
      continue;
    }
    for (const [i, stage] of weight.stages.entries()) {
      const tiles = (rows * cols) / (stage.tile[0] * stage.tile[1]);
      const place = (key) => `${where}.stages[${i}].${key}`;
      yield { name: stage.codes, where: place("codes"), dtypes: ["U8"], shape: [tiles, stage.tileBytes], codes: true };
      // [TQ-NUM-1, TQ-NUM-8, TQ-NUM-9]
      const vectors = cols / stage.vector_length;
      for (const [key, outer] of [
        ["scales", "outer_scales"],
        ["offsets", "outer_offsets"],
      ]) {
        const dtypes = stage[outer] === null ? REAL : SHORT;
        const shape = [(a) => a === 1 || a === rows, (b) => b >= 1 && vectors % b === 0];
        if (stage[key] !== null) yield { name: stage[key], where: place(key), dtypes, shape: [rows, vectors] };
        if (stage[outer] !== null) yield { name: stage[outer], where: place(outer), dtypes: REAL, shape };
      }
    }
    if (weight.column_scale !== null) {
      yield { name: weight.column_scale, where: `${where}.column_scale`, dtypes: REAL, shape: [cols] }; // [TQ-NUM-2]
    }
  }
}

/** Holds manifest and payload against each other [TQ-PAY-6, TQ-TIE-1, TQ-ACC-1]. */
function bind(manifest, payload) {
  const wanted = [...requirements(manifest, payload)];
  const named = new Set();
  for (const { name, where } of wanted) {
    check(!named.has(name), "BIND.MULTIPLE", where, `${name} is referenced more than once`);
    check(payload.has(name), "BIND.MISSING_TENSOR", where, `the payload lacks ${name}`);
    named.add(name);
  }
  for (const name of payload.keys()) {
    check(named.has(name), "BIND.EXTRA_TENSOR", name, "the manifest does not reference it");
  }
  const fits = (shape, wants) =>
    shape.length === wants.length && wants.every((n, i) => (typeof n === "number" ? n === shape[i] : n(shape[i])));
  const tell = ({ dtype, shape }) => `found ${dtype} [${shape.join(", ")}]`;
  for (const { name, where, dtypes, shape, codes } of wanted) {
    const tensor = payload.get(name);
    check(dtypes.includes(tensor.dtype) && (codes || fits(tensor.shape, shape)), "BIND.TENSOR", where, tell(tensor));
  }
  for (const [alias, name] of manifest.tied_weights) {
    const right = manifest.tensors.has(name) && !manifest.tensors.has(alias);
    check(right, "BIND.TIED", `tied_weights['${alias}']`, "expected the name of a weight for another");
  }
  const totals = countTotals(manifest, payload);
  for (const key in TOTALS) {
    const right = manifest.accounting[key] === totals[key];
    check(right, "BIND.ACCOUNTING", `accounting.${key}`, `expected ${totals[key]}, got ${manifest.accounting[key]}`);
  }
  const near = Math.abs(manifest.accounting.ratio - totals.ratio) <= 0.001;
  check(near, "BIND.ACCOUNTING", "accounting.ratio", `expected ${totals.ratio}, got ${manifest.accounting.ratio}`);
  for (const { name, where, shape, codes } of wanted) {
    // [TQ-CODE-4]
    if (codes) check(fits(payload.get(name).shape, shape), "PACK.LENGTH", where, tell(payload.get(name)));
  }
}

// ------------------------------------------------------------------------------------------------ 6 Codes

/** The symbols of one tile, which begins at `begin` of `bytes`, into `symbols` [n] [TQ-CODE-5, TQ-CODE-6]. */
export function unpack(bytes, begin, bits, window, symbols) {
  const length = symbols.length * bits;
  const mask = 2 ** window - 1;
  for (let t = 0, bit = 0; t < symbols.length; t += 1, bit += bits) {
    if (bit + window <= length) {
      const at = begin + (bit >> 3);
      symbols[t] = ((bytes[at] | (bytes[at + 1] << 8) | (bytes[at + 2] << 16)) >> (bit & 7)) & mask;
      continue;
    }
    symbols[t] = 0; // the stream goes on at its start
    for (let j = 0; j < window; j += 1) {
      const i = (bit + j) % length;
      symbols[t] |= ((bytes[begin + (i >> 3)] >> (i & 7)) & 1) << j;
    }
  }
}

// ------------------------------------------------------------------------------------------------ 7 Codebooks

const CODEBOOK = {
  entries: [integer],
  dimension: [integer],
  values: [orNull(list(number)), null],
  tensor: [orNull(string), null],
  rows: [orNull(integer), null],
  origin: [orNull(map), null],
};
const ORIGIN = {
  method: [string],
  vector_length: [orNull(integer), null],
  grid_size: [orNull(integer), null],
  iterations: [orNull(integer), null],
};

/** An entry of `codebooks`. */
function readCodebook(value, where, id) {
  checkName(id, where);
  const codebook = readObject(value, where, CODEBOOK);
  // [TQ-BOOK-1, TQ-BOOK-3, TQ-BOOK-5]
  check(codebook.values === null || codebook.tensor === null, "SCHEMA.AMBIGUOUS", where, "values or tensor, not both");
  check(codebook.values !== null || codebook.tensor !== null, "SCHEMA.MISSING_FIELD", where, "values or tensor");
  checkRange(codebook.entries, 1, M20, `${where}.entries`);
  checkRange(codebook.dimension, 1, 64, `${where}.dimension`);
  const count = codebook.entries * codebook.dimension;
  checkRange(count, 1, codebook.values ? 4096 : M20, `${where}.entries`);
  if (codebook.values) checkValue(codebook.values.length === count, `${where}.values`, `${count} numbers`);
  else checkName(codebook.tensor, `${where}.tensor`);
  const rowsFit = codebook.rows === null || (codebook.tensor !== null && codebook.rows >= 0);
  checkValue(rowsFit, `${where}.rows`, "a number of rows, and tensor");
  if (codebook.origin === null) return codebook;
  // [TQ-BOOK-7]; that the levels are those of the construction is for a validator
  const origin = (codebook.origin = readObject(codebook.origin, `${where}.origin`, ORIGIN));
  const ranges = { vector_length: [1, M20], grid_size: [3, M20 + 1], iterations: [1, 4096] };
  const sphere = origin.method === "lloyd-max-sphere";
  for (const [key, [low, high]] of Object.entries(ranges)) {
    if (origin[key] !== null) checkRange(origin[key], low, high, `${where}.origin.${key}`);
    else check(!sphere, "SCHEMA.MISSING_FIELD", `${where}.origin.${key}`, "required by this method");
  }
  const plain = codebook.dimension === 1 && codebook.rows === null && codebook.entries <= 256;
  checkValue(!sphere || plain, `${where}.origin`, "a method that makes such a codebook");
  // [TQ-BOOK-8]
  const scalar = codebook.dimension === 1 && codebook.rows === null;
  checkValue(origin.method !== "byte-sum" || scalar, `${where}.origin`, "a method that makes such a codebook");
  return codebook;
}

// ------------------------------------------------------------------------------------------------ 8 Transforms

const TRANSFORM = { kind: [string], size: [integer] };
const TRANSFORM_KINDS = {
  identity: {},
  hadamard: { factors: [list(integer)], signs: [string], seed: [orNull(integer), null] },
  dense: { matrix: [string] },
  givens: { pairs: [string], angles: [string] },
  permutation: { index: [string] },
};

/** An entry of `transforms`. */
function readTransform(value, where, id) {
  checkName(id, where);
  const transform = readKind(value, where, TRANSFORM, TRANSFORM_KINDS);
  const { kind, size, factors, signs, seed } = transform;
  checkRange(size, 1, M20, `${where}.size`);
  for (const key of ["matrix", "pairs", "angles", "index"]) {
    if (key in transform) checkName(transform[key], `${where}.${key}`);
  }
  if (kind === "dense") checkRange(size, 1, 4096, `${where}.size`); // [TQ-TRAN-7]
  if (kind === "givens") checkValue(size % 2 === 0, `${where}.size`, "an even number"); // [TQ-TRAN-8]
  if (kind !== "hadamard") return transform;
  // [TQ-TRAN-4]
  checkRange(factors.length, 1, 20, `${where}.factors`);
  factors.forEach((f, i) =>
    checkValue(factorKind(f) !== null, `${where}.factors[${i}]`, `an order by TQ-TRAN-4, got ${f}`),
  );
  checkValue(factors.reduce((a, b) => a * b, 1) === size, `${where}.factors`, `factors with the product ${size}`);
  // [TQ-TRAN-5]
  const digits = 2 * Math.ceil(size / 8);
  checkValue(signs.length === digits && /^[0-9a-f]*$/.test(signs), `${where}.signs`, `${digits} lower-case hex digits`);
  const unused = size % 8 ? parseInt(signs.slice(-2), 16) >> (size % 8) : 0;
  checkValue(unused === 0, `${where}.signs`, "unused bits that are zero");
  // [TQ-TRAN-6]; that the signs are those of the seed is for a validator
  if (seed !== null) checkRange(seed, 0, Infinity, `${where}.seed`);
  return transform;
}

function isPrime(q) {
  for (let k = 2; k * k <= q; k += 1) if (q % k === 0) return false;
  return q > 1;
}

/** Which construction gives H_f; null where none does [TQ-TRAN-4]. */
function factorKind(f) {
  if (f < 2 || f > M20) return null;
  if ((f & (f - 1)) === 0) return "sylvester";
  if (f > 2048 || f % 4 !== 0) return null;
  if (isPrime(f - 1)) return "paley-1"; // f - 1 mod 4 = 3
  return f % 4 === 0 && (f / 2 - 1) % 4 === 1 && isPrime(f / 2 - 1) ? "paley-2" : null;
}

const hadamards = new Map();

/** H_f, or its transpose, as Float32Array [f, f] [TQ-TRAN-4]. */
export function hadamardFactor(f, transposed = false) {
  const key = transposed ? -f : f;
  if (hadamards.has(key)) return hadamards.get(key);
  const kind = factorKind(f);
  const q = kind === "paley-1" ? f - 1 : f / 2 - 1;
  const chi = new Int8Array(q).fill(-1);
  for (let i = 0; i < q; i += 1) chi[(i * i) % q] = 1;
  chi[0] = 0;
  const difference = (i, j) => chi[(i - j + q) % q];
  const entries = {
    sylvester: (i, j) => (popcount(i & j) % 2 ? -1 : 1),
    "paley-1": (i, j) => (i === 0 || i === j ? 1 : j === 0 ? -1 : difference(i, j)),
    "paley-2": (i, j) => {
      const [row, col, a, b] = [i >> 1, j >> 1, i & 1, j & 1];
      if (row === col) return a === 0 && b === 0 ? 1 : -1;
      return (row === 0 || col === 0 ? 1 : difference(row, col)) * (a === 1 && b === 1 ? -1 : 1);
    },
  };
  const entry = entries[kind];
  const matrix = new Float32Array(f * f);
  for (let i = 0; i < f; i += 1) {
    for (let j = 0; j < f; j += 1) matrix[i * f + j] = transposed ? entry(j, i) : entry(i, j);
  }
  hadamards.set(key, matrix);
  return matrix;
}

function popcount(n) {
  let count = 0;
  for (; n; n &= n - 1) count += 1;
  return count;
}

/** v becomes (H_f1 ⊗ H_f2 ⊗ ...) v or, with `transposed`, its transpose times v [TQ-TRAN-3]. */
function multiplyKronecker(v, factors, transposed) {
  let stride = v.length;
  for (const f of factors) {
    const span = stride;
    stride /= f;
    const butterfly = factorKind(f) === "sylvester";
    const matrix = butterfly ? null : hadamardFactor(f, transposed);
    const row = new Float64Array(f);
    for (let begin = 0; begin < v.length; begin += span) {
      for (let first = begin; first < begin + stride; first += 1) {
        if (butterfly) {
          for (let half = 1; half < f; half *= 2) {
            for (let i = 0; i < f; i += 1) {
              if (i & half) continue;
              const a = first + i * stride;
              const b = a + half * stride;
              const x = v[a];
              v[a] = x + v[b];
              v[b] = x - v[b];
            }
          }
          continue;
        }
        for (let j = 0; j < f; j += 1) row[j] = v[first + j * stride];
        for (let i = 0, at = 0; i < f; i += 1) {
          let sum = 0;
          for (let j = 0; j < f; j += 1) sum += matrix[at++] * row[j];
          v[first + i * stride] = sum;
        }
      }
    }
  }
}

// The transforms as pairs of functions that change one block [B] in place: forward is T, inverse is T^-1.

function hadamardTransform({ size, factors, signs }) {
  const s = Float64Array.from({ length: size }, (_, j) => {
    const byte = parseInt(signs.slice(2 * (j >> 3), 2 * (j >> 3) + 2), 16); // [TQ-TRAN-5]
    return (byte >> (j & 7)) & 1 ? -1 : 1;
  });
  const root = Math.sqrt(size);
  return {
    forward(v) {
      for (let i = 0; i < size; i += 1) v[i] *= s[i] / root;
      multiplyKronecker(v, factors, false);
    },
    inverse(y) {
      multiplyKronecker(y, factors, true);
      for (let i = 0; i < size; i += 1) y[i] *= s[i] / root;
    },
  };
}

function denseTransform({ size }, matrix) {
  function multiply(v, rowStep, colStep) {
    const x = v.slice();
    for (let i = 0; i < size; i += 1) {
      let sum = 0;
      for (let j = 0; j < size; j += 1) sum += matrix[i * rowStep + j * colStep] * x[j];
      v[i] = sum;
    }
  }
  return { forward: (v) => multiply(v, size, 1), inverse: (y) => multiply(y, 1, size) }; // [TQ-TRAN-7]
}

function givensTransform({ size }, pairs, angles) {
  const half = size / 2;
  const rounds = angles.length / half;
  function turn(v, round, sign) {
    for (let k = round * half; k < (round + 1) * half; k += 1) {
      const [i, j] = [pairs[2 * k], pairs[2 * k + 1]];
      const [c, s] = [Math.cos(angles[k]), sign * Math.sin(angles[k])];
      const [x, y] = [v[i], v[j]];
      v[i] = c * x - s * y;
      v[j] = s * x + c * y;
    }
  }
  return {
    forward(v) {
      for (let round = 0; round < rounds; round += 1) turn(v, round, 1); // [TQ-TRAN-8]
    },
    inverse(y) {
      for (let round = rounds - 1; round >= 0; round -= 1) turn(y, round, -1);
    },
  };
}

function permutationTransform(index) {
  return {
    forward(v) {
      const x = v.slice();
      index.forEach((from, i) => (v[i] = x[from])); // [TQ-TRAN-9]
    },
    inverse(y) {
      const x = y.slice();
      index.forEach((to, i) => (y[to] = x[i]));
    },
  };
}

/** Fails with `code` unless each run of `size` indices holds every integer from 0 to size - 1 once. */
function checkPermutations(indices, size, code, where) {
  let seen;
  indices.forEach((index, i) => {
    if (i % size === 0) seen = new Uint8Array(size);
    check(index >= 0 && index < size && !seen[index], code, where, `${index} occurs twice, or is out of range`);
    seen[index] = 1;
  });
}

function applyToBlocks(values, size, change) {
  for (let begin = 0; begin < values.length; begin += size) change(values.subarray(begin, begin + size));
}

// ------------------------------------------------------------------------------------------------ 9 Arithmetic

function e4m3(byte) {
  if ((byte & 0x7f) === 0x7f) return NaN;
  const fraction = (byte & 7) / 8;
  const exponent = (byte >> 3) & 15;
  const magnitude = exponent === 0 ? fraction * 2 ** -6 : (1 + fraction) * 2 ** (exponent - 7);
  return byte & 0x80 ? -magnitude : magnitude;
}

function half(bits) {
  const fraction = (bits & 1023) / 1024;
  const exponent = (bits >> 10) & 31;
  const finite = exponent === 0 ? fraction * 2 ** -14 : (1 + fraction) * 2 ** (exponent - 15);
  const magnitude = exponent < 31 ? finite : fraction ? NaN : Infinity;
  return bits & 0x8000 ? -magnitude : magnitude;
}

const scratch = new DataView(new ArrayBuffer(8));

function widen(bits) {
  scratch.setUint32(0, bits << 16);
  return scratch.getFloat32(0);
}

/** The dtypes of [TQ-PAY-4]: bytes of an element, and the element at byte i of a DataView [TQ-PAY-7, TQ-NUM-8]. */
export const ELEMENTS = {
  BOOL: { size: 1, get: (view, i) => (view.getUint8(i) ? 1 : 0) },
  U8: { size: 1, get: (view, i) => view.getUint8(i) },
  I8: { size: 1, get: (view, i) => view.getInt8(i) },
  F8_E5M2: { size: 1, get: (view, i) => half(view.getUint8(i) << 8) },
  F8_E4M3: { size: 1, get: (view, i) => e4m3(view.getUint8(i)) },
  F8_E8M0: { size: 1, get: (view, i) => (view.getUint8(i) === 255 ? NaN : 2 ** (view.getUint8(i) - 127)) },
  U16: { size: 2, get: (view, i) => view.getUint16(i, true) },
  I16: { size: 2, get: (view, i) => view.getInt16(i, true) },
  F16: { size: 2, get: (view, i) => half(view.getUint16(i, true)) },
  BF16: { size: 2, get: (view, i) => widen(view.getUint16(i, true)) },
  U32: { size: 4, get: (view, i) => view.getUint32(i, true) },
  I32: { size: 4, get: (view, i) => view.getInt32(i, true) },
  F32: { size: 4, get: (view, i) => view.getFloat32(i, true) },
  U64: { size: 8, get: (view, i) => Number(view.getBigUint64(i, true)) },
  I64: { size: 8, get: (view, i) => Number(view.getBigInt64(i, true)) },
  F64: { size: 8, get: (view, i) => view.getFloat64(i, true) },
};

/** The elements of a tensor's bytes as Float64Array; exact but for 64-bit integers beyond 2^53. */
export function toNumbers(bytes, dtype) {
  const { size, get } = ELEMENTS[dtype];
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const numbers = allocate(bytes.byteLength / size, Float64Array, dtype);
  for (let i = 0; i < numbers.length; i += 1) numbers[i] = get(view, i * size);
  return numbers;
}

function checkFinite(values, where) {
  for (const value of values) if (!Number.isFinite(value)) fail("DATA.NON_FINITE", where, `found ${value}`);
  return values;
}

/** Rounds to `mantissa` bits, to nearest, ties to even, with subnormals below 2^lowest; NaN beyond `largest`. */
function rounding(mantissa, lowest, largest) {
  // Added and taken away again, a number of the right magnitude leaves no more: one for each exponent of binary64.
  const magic = Float64Array.from({ length: 2048 }, (_, e) => 1.5 * 2 ** (52 - mantissa + Math.max(e - 1023, lowest)));
  return (x) => {
    scratch.setFloat64(0, x);
    const m = magic[(scratch.getUint16(0) >> 4) & 0x7ff];
    const rounded = x + m - m;
    return Math.abs(rounded) <= largest ? rounded : NaN;
  };
}

// The dtypes of weights: rounding, and writing what is rounded [TQ-NUM-5].
const CASTS = {
  F32: { round: Math.fround, set: (view, i, value) => view.setFloat32(i, value, true) },
  BF16: {
    round: rounding(7, -126, 2 ** 128 - 2 ** 120),
    set(view, i, value) {
      scratch.setFloat32(0, value);
      view.setUint16(i, scratch.getUint16(0), true);
    },
  },
  F16: {
    round: rounding(10, -14, 65504),
    set(view, i, value) {
      scratch.setFloat32(0, Math.abs(value));
      const normal = Math.abs(value) >= 2 ** -14;
      const bits = normal ? (scratch.getUint32(0) >> 13) - (112 << 10) : Math.abs(value) * 2 ** 24;
      view.setUint16(i, bits | (value < 0 ? 0x8000 : 0), true);
    },
  },
};

// ------------------------------------------------------------------------------------------------ 10 to 12 Decoding

const GROUP = 2 ** 18; // elements that are decoded at once, or one tile row [TQ-LIM-2]

/** Yields [first, last]: groups of whole tile rows that cover rows begin to end of a weight. */
function* rowGroups({ cols, tileRows }, begin, end) {
  const step = tileRows * Math.max(1, Math.floor(GROUP / (cols * tileRows)));
  const stop = Math.ceil(end / tileRows) * tileRows;
  for (let first = begin - (begin % tileRows); first < end; first += step) yield [first, Math.min(first + step, stop)];
}

/** An opened repository: `manifest`, and `payload` as a Map from storage name to { dtype, shape, scalars, bytes }. */
class Repository {
  #source;
  #made = new Map(); // levels of codebooks, and transforms

  constructor(source, manifest, payload) {
    this.#source = source;
    Object.assign(this, { manifest, payload });
  }

  /** The entry of a weight or an alias [TQ-TIE-1]. */
  weight(name) {
    const weight = this.manifest.tensors.get(this.manifest.tied_weights.get(name) ?? name);
    if (!weight) throw new RangeError(`there is no weight ${name}`);
    return weight;
  }

  /** Rows begin to end of a weight as { dtype, shape, bytes }, little-endian; passthrough tensors come whole. */
  async decode(name, { begin = 0, end = Infinity, onProgress = () => {} } = {}) {
    const weight = this.weight(name);
    const { dtype, shape, rows, cols } = weight;
    const where = `tensors['${name}']`;
    if (weight.kind === "passthrough") return { dtype, shape, bytes: await this.#bytes(weight.data) }; // [TQ-PASS-1]
    const last = Math.min(end, rows);
    if (begin < 0 || begin > last) throw new RangeError(`${name}: there are no rows ${begin} to ${end} of ${rows}`);
    const count = (last - begin) * cols;
    const { size } = ELEMENTS[dtype];
    const bytes = allocate(count * size, Uint8Array, where);
    const view = new DataView(bytes.buffer);
    const cast = CASTS[dtype];
    for await (const [first, values] of this.#groups(weight, where, begin, last)) {
      for (let i = 0, at = (first - begin) * cols; i < values.length; i += 1, at += 1) {
        if (at < 0 || at >= count) continue; // a tile row may reach beyond the rows that are wanted
        const value = cast.round(values[i]);
        // [TQ-NUM-6]
        if (!Number.isFinite(value)) fail("DATA.NON_FINITE", where, `element ${i + first * cols} is beyond ${dtype}`);
        cast.set(view, at * size, value);
      }
      onProgress(Math.min(last, first + values.length / cols) - begin, last - begin);
    }
    return { dtype, shape: begin === 0 && last === rows ? shape : [last - begin, cols], bytes };
  }

  /** Yields [first row, Float64Array [rows, cols]] in groups of tile rows: the sum of the stages [TQ-STAGE-2]. */
  async *#groups(weight, where, begin, end) {
    const { cols } = weight;
    const { columns, tables } = await this.#tables(weight, where);
    for (const [first, last] of rowGroups(weight, begin, end)) {
      let sum = null;
      for (const [i, stage] of weight.stages.entries()) {
        const values = await this.#stage(weight, i, where, tables[i].levels, first, last);
        if (tables[i].change) applyToBlocks(values, stage.transform.size, tables[i].change.inverse);
        if (sum === null) sum = values;
        else for (let k = 0; k < sum.length; k += 1) sum[k] += values[k];
      }
      if (columns) for (let k = 0; k < sum.length; k += 1) sum[k] *= columns[k % cols]; // [TQ-NUM-2]
      yield [first, sum];
    }
  }

  /** scale * level + offset of rows first to last, before T^-1, as Float64Array [rows, cols] [TQ-STAGE-1]. */
  async #stage(weight, index, weightWhere, levels, first, last) {
    const { cols } = weight;
    const stage = weight.stages[index];
    const where = `${weightWhere}.stages[${index}]`;
    const { codebook, bits, window, tileBytes, vector_length: G } = stage;
    const [tr, tc] = stage.tile;
    const p = codebook.dimension;
    const values = new Float64Array((last - first) * cols);
    const across = cols / tc;
    const tile = (first / tr) * across;
    const tiles = ((last - first) / tr) * across;
    const codes = await this.#bytes(stage.codes, tile * tileBytes, tiles * tileBytes);
    const symbols = new Uint16Array(stage.symbols);
    const used = (stage.symbols * bits) % 8;
    for (let k = 0; k < tiles; k += 1) {
      const padding = used ? codes[(k + 1) * tileBytes - 1] >> used : 0;
      check(padding === 0, "PACK.PADDING", `${where}.codes`, `tile ${tile + k} has a padding bit set`); // [TQ-CODE-5]
      unpack(codes, k * tileBytes, bits, window, symbols);
      // [TQ-CODE-3, TQ-BOOK-6]
      const row0 = Math.floor(k / across) * tr;
      const col0 = (k % across) * tc;
      for (let t = 0, row = row0, col = col0; t < symbols.length; t += 1, col += p) {
        if (col === col0 + tc) {
          row += 1;
          col = col0;
        }
        // [TQ-BOOK-3, TQ-BOOK-4]
        if (symbols[t] >= codebook.entries) fail("PACK.CODE_RANGE", `${where}.codes`, `found symbol ${symbols[t]}`);
        const entry = codebook.rows === null ? symbols[t] : (first + row) * codebook.entries + symbols[t];
        for (let e = 0; e < p; e += 1) values[row * cols + col + e] = levels[entry * p + e];
      }
    }
    const read = (key) => this.#scales(weight, stage, key, `${where}.${key}`, first, last);
    const scales = await read("scales");
    const offsets = stage.offsets === null ? null : await read("offsets");
    for (let v = 0, i = 0; v < scales.length; v += 1) {
      const offset = offsets ? offsets[v] : 0;
      for (const end = i + G; i < end; i += 1) values[i] = values[i] * scales[v] + offset;
    }
    return values;
  }

  /** The `scales` or `offsets` of rows first to last, times the outer ones, as Float64Array [rows, cols / G]. */
  async #scales({ rows, cols }, stage, key, where, first, last) {
    // [TQ-NUM-1, TQ-NUM-8, TQ-NUM-9]
    const vectors = cols / stage.vector_length;
    const scales = await this.#real(stage[key], where, first * vectors, (last - first) * vectors);
    const outerName = stage[`outer_${key}`];
    if (outerName === null) return scales;
    const [a, b] = this.payload.get(outerName).shape;
    const whole = a === 1 && rows !== 1;
    const outer = await this.#real(outerName, where, whole ? 0 : first * b, whole ? b : (last - first) * b);
    const share = vectors / b;
    for (let i = 0; i < scales.length; i += 1) {
      const row = whole ? 0 : Math.floor(i / vectors);
      scales[i] *= outer[row * b + Math.floor((i % vectors) / share)];
    }
    return scales;
  }

  /** What all rows of a weight need: `columns` [cols] or null, and for each stage its `levels` and its `change`. */
  async #tables(weight, where) {
    const { column_scale: name, stages } = weight;
    const columns = name === null ? null : await this.#real(name, `${where}.column_scale`);
    const tables = [];
    for (const { codebook, transform } of stages) {
      const levels = await this.#once(`codebooks['${codebook.name}']`, (place) => this.#levels(codebook, place));
      const change = await this.#once(`transforms['${transform.name}']`, (place) => this.#change(transform, place));
      tables.push({ levels, change });
    }
    return { columns, tables };
  }

  async #once(key, make) {
    if (!this.#made.has(key)) this.#made.set(key, await make(key));
    return this.#made.get(key);
  }

  /** The levels of a codebook as Float64Array [entries, p] or [rows, entries, p] [TQ-BOOK-2, TQ-BOOK-3]. */
  async #levels({ values, tensor }, where) {
    return values ? checkFinite(Float64Array.from(values, Math.fround), where) : this.#real(tensor, where);
  }

  /** The functions { forward, inverse } of a transform, null for the identity. */
  async #change(transform, where) {
    const { kind, size } = transform;
    if (kind === "identity") return null;
    if (kind === "hadamard") return hadamardTransform(transform);
    if (kind === "dense") return denseTransform(transform, await this.#real(transform.matrix, where));
    const integers = async (name) => Int32Array.from(toNumbers(await this.#bytes(name), "I32"));
    if (kind === "permutation") {
      const index = await integers(transform.index);
      checkPermutations(index, size, "DATA.PERMUTATION", where); // [TQ-TRAN-9]
      return permutationTransform(index);
    }
    const pairs = await integers(transform.pairs);
    checkPermutations(pairs, size, "DATA.PAIRS", where); // [TQ-TRAN-8]
    return givensTransform(transform, pairs, await this.#real(transform.angles, where));
  }

  /** Some elements of a payload tensor, as finite numbers. */
  async #real(name, where, first = 0, count = Infinity) {
    const { dtype, scalars } = this.payload.get(name);
    const { size } = ELEMENTS[dtype];
    const bytes = await this.#bytes(name, first * size, Math.min(count, scalars) * size);
    return checkFinite(toNumbers(bytes, dtype), where);
  }

  async #bytes(name, offset = 0, length = Infinity) {
    const { file, begin, bytes } = this.payload.get(name);
    return file.read(begin + offset, Math.min(length, bytes));
  }

  /** y = W x without decoding W, Float64Array [rows], from x [cols], in binary64 [TQ-FUSE-1]. */
  async product(name, x) {
    const weight = this.weight(name);
    const where = `tensors['${name}']`;
    if (weight.kind !== "quantized") throw new RangeError(`${name} is not quantized`);
    if (x.length !== weight.cols) throw new RangeError(`${name} has ${weight.cols} columns, x has ${x.length} values`);
    const { columns, tables } = await this.#tables(weight, where);
    const y = new Float64Array(weight.rows);
    for (const [i, { transform }] of weight.stages.entries()) {
      const { levels, change } = tables[i];
      const z = Float64Array.from(x, (value, c) => (columns ? columns[c] * value : value));
      if (change) applyToBlocks(z, transform.size, change.forward);
      for (const [first, last] of rowGroups(weight, 0, weight.rows)) {
        const values = await this.#stage(weight, i, where, levels, first, last);
        for (let row = first, k = 0; row < last; row += 1) {
          for (let c = 0; c < weight.cols; c += 1, k += 1) y[row] += values[k] * z[c];
        }
      }
    }
    return y;
  }

  /** Checks size and digests of listed files, by default those of the payload [TQ-REPO-4, TQ-REPO-8]. */
  async verify(names = this.files("payload"), { onProgress = () => {} } = {}) {
    for (const name of names) {
      const { sha256, chunks, chunk_size: chunkSize } = this.manifest.files.get(name);
      const file = await openListed(this.#source, this.manifest, name);
      const whole = new Sha256();
      let chunk = new Sha256();
      for (let at = 0, k = 0; at < file.size;) {
        const chunkEnd = chunks ? Math.min(file.size, (k + 1) * chunkSize) : file.size;
        const part = await file.read(at, Math.min(M20, chunkEnd - at));
        whole.update(part);
        if (chunks) chunk.update(part);
        at += part.length;
        onProgress(part.length, name);
        if (chunks && at === chunkEnd) {
          checkDigest(chunk.hex(), chunks[k], name, `chunk ${k}`);
          chunk = new Sha256();
          k += 1;
        }
      }
      checkDigest(whole.hex(), sha256, name, "the file");
    }
  }

  /** The names of the listed files of a role. */
  files(role) {
    return [...this.manifest.files].filter(([, file]) => file.role === role).map(([name]) => name);
  }

  /** All bytes of a listed file, whose size and digest are checked. */
  async read(name) {
    const file = await openListed(this.#source, this.manifest, name);
    const bytes = await file.read(0, file.size);
    const digest = new Sha256();
    digest.update(bytes);
    checkDigest(digest.hex(), this.manifest.files.get(name).sha256, name, "the file");
    return bytes;
  }
}

function checkDigest(found, expected, name, what) {
  check(found === expected, "BIND.DIGEST", name, `${what} differs from its digest`);
}

/** The names of the payload tensors that belong to a weight alone, in the order of the manifest's keys. */
export function storageNames(weight) {
  if (weight.kind === "passthrough") return [weight.data];
  const keys = ["codes", "scales", "outer_scales", "offsets", "outer_offsets"];
  const names = weight.stages.flatMap((stage) => keys.map((key) => stage[key]));
  return [...names, weight.column_scale].filter((name) => name !== null);
}

// ------------------------------------------------------------------------------------------------ 13 Sharding

/** [TQ-SHARD-1]: one payload file, or N that are numbered. */
function checkShards(manifest) {
  const payload = [];
  for (const [name, { role }] of manifest.files) {
    const named = name.startsWith("turboquant_weights") && name.endsWith(".safetensors");
    check(role === "payload" || !named, "BIND.SHARDS", name, "a file of this name is a payload file");
    if (role === "payload") payload.push(name);
  }
  if (payload.length === 1 && payload[0] === "turboquant_weights.safetensors") return;
  const count = payload.length;
  const digits = (n) => String(n).padStart(5, "0");
  const shards = Array.from(
    { length: count },
    (_, i) => `turboquant_weights-${digits(i + 1)}-of-${digits(count)}.safetensors`,
  );
  const complete = count >= 2 && shards.every((name) => payload.includes(name));
  check(complete, "BIND.SHARDS", "files", "expected one payload file, or numbered ones, all of them");
}

// ------------------------------------------------------------------------------------------------ 14 Accounting

const TOTALS = {
  original_bytes: [integer],
  stored_bytes: [integer],
  quantized_tensors: [integer],
  passthrough_tensors: [integer],
  quantized_scalars: [integer],
  passthrough_scalars: [integer],
};
const ACCOUNTING = { ...TOTALS, ratio: [number] };

/** [TQ-ACC-2]. Sums are exact as far as they can be right: binary64 never rounds what exceeds 2^53 to below. */
function countTotals(manifest, payload) {
  const totals = Object.fromEntries(Object.keys(TOTALS).map((key) => [key, 0]));
  for (const { kind, dtype, scalars } of manifest.tensors.values()) {
    totals.original_bytes += scalars * ELEMENTS[dtype].size;
    totals[`${kind}_tensors`] += 1;
    totals[`${kind}_scalars`] += scalars;
  }
  for (const { bytes } of payload.values()) totals.stored_bytes += bytes;
  return { ...totals, ratio: totals.stored_bytes ? totals.original_bytes / totals.stored_bytes : 0 };
}

// ------------------------------------------------------------------------------------------------ Opening a repository

/** A repository of which only the manifest was read and checked: its files can be read and verified, no weight decoded. */
export async function openManifest(source) {
  const file = await source(MANIFEST);
  check(file, "BIND.MISSING_FILE", MANIFEST, "the repository has no manifest");
  check(file.size <= MANIFEST_SIZE, "LIMIT.SIZE", MANIFEST, "a manifest has at most 64 MiB"); // [TQ-LIM-1]
  const manifest = readManifest(await file.read(0, file.size));
  checkShards(manifest);
  return new Repository(source, manifest, new Map());
}

/** Opens a repository: reads and checks the manifest, the sizes and the headers of the payload, and how they fit. */
export async function openRepository(source) {
  return openPayload(source, await openManifest(source));
}

/** The rest of openRepository, for what openManifest gave. */
export async function openPayload(source, { manifest }) {
  const payload = new Map();
  const names = [...manifest.files].filter(([, { role }]) => role === "payload").map(([name]) => name);
  const files = new Map();
  for (const name of names) files.set(name, await openListed(source, manifest, name));
  for (const [name, shard] of files) {
    const tensors = await readContainer(name, shard);
    check(tensors.size > 0 || names.length === 1, "BIND.SHARDS", name, "a shard without tensors"); // [TQ-SHARD-2]
    for (const [key, tensor] of tensors) {
      check(!payload.has(key), "CONTAINER.DUPLICATE_NAME", name, `another shard has ${key}, too`); // [TQ-PAY-3]
      payload.set(key, tensor);
    }
  }
  bind(manifest, payload);
  return new Repository(source, manifest, payload);
}

async function openListed(source, manifest, name) {
  const file = await source(name);
  check(file, "BIND.MISSING_FILE", name, "a listed file is absent"); // [TQ-REPO-1]
  const { size } = manifest.files.get(name);
  check(file.size === size, "BIND.SIZE", name, `expected ${size} bytes, found ${file.size}`); // [TQ-REPO-4]
  return file;
}

// ------------------------------------------------------------------------------------------------ SHA-256
//
// FIPS 180-4. Browsers have a digest of whole buffers only, and none at all on pages without HTTPS.

function fractionBits(x) {
  return Math.floor((x - Math.floor(x)) * 2 ** 32) | 0;
}

const PRIMES = Array.from({ length: 310 }, (_, i) => i + 2).filter(isPrime);
const SHA_ROUNDS = Int32Array.from(PRIMES.slice(0, 64), (p) => fractionBits(Math.cbrt(p)));
const SHA_START = Int32Array.from(PRIMES.slice(0, 8), (p) => fractionBits(Math.sqrt(p)));

export class Sha256 {
  #state = SHA_START.slice();
  #words = new Int32Array(64);
  #block = new Uint8Array(64);
  #filled = 0;
  #length = 0; // bytes

  update(bytes) {
    this.#length += bytes.length;
    for (let at = 0; at < bytes.length;) {
      const part = bytes.subarray(at, at + 64 - this.#filled);
      at += part.length;
      if (part.length === 64) {
        this.#compress(part);
        continue;
      }
      this.#block.set(part, this.#filled);
      this.#filled += part.length;
      if (this.#filled < 64) return;
      this.#filled = 0;
      this.#compress(this.#block);
    }
  }

  /** The digest in 64 hex digits; ends the computation. */
  hex() {
    const bits = this.#length * 8;
    const end = new Uint8Array(((this.#filled < 56 ? 64 : 128) - this.#filled) | 0);
    end[0] = 0x80;
    const view = new DataView(end.buffer);
    view.setUint32(end.length - 8, Math.floor(bits / 2 ** 32));
    view.setUint32(end.length - 4, bits % 2 ** 32);
    this.update(end);
    return Array.from(this.#state, (word) => (word >>> 0).toString(16).padStart(8, "0")).join("");
  }

  #compress(block) {
    const w = this.#words;
    for (let t = 0; t < 16; t += 1) {
      w[t] = (block[4 * t] << 24) | (block[4 * t + 1] << 16) | (block[4 * t + 2] << 8) | block[4 * t + 3];
    }
    for (let t = 16; t < 64; t += 1) {
      const x = w[t - 15];
      const y = w[t - 2];
      const s0 = ((x >>> 7) | (x << 25)) ^ ((x >>> 18) | (x << 14)) ^ (x >>> 3);
      const s1 = ((y >>> 17) | (y << 15)) ^ ((y >>> 19) | (y << 13)) ^ (y >>> 10);
      w[t] = (w[t - 16] + s0 + w[t - 7] + s1) | 0;
    }
    const state = this.#state;
    let a = state[0];
    let b = state[1];
    let c = state[2];
    let d = state[3];
    let e = state[4];
    let f = state[5];
    let g = state[6];
    let h = state[7];
    for (let t = 0; t < 64; t += 1) {
      const s1 = ((e >>> 6) | (e << 26)) ^ ((e >>> 11) | (e << 21)) ^ ((e >>> 25) | (e << 7));
      const t1 = (h + s1 + ((e & f) ^ (~e & g)) + SHA_ROUNDS[t] + w[t]) | 0;
      const s0 = ((a >>> 2) | (a << 30)) ^ ((a >>> 13) | (a << 19)) ^ ((a >>> 22) | (a << 10));
      const t2 = (s0 + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      h = g;
      g = f;
      f = e;
      e = (d + t1) | 0;
      d = c;
      c = b;
      b = a;
      a = (t1 + t2) | 0;
    }
    state[0] += a; // an Int32Array wraps
    state[1] += b;
    state[2] += c;
    state[3] += d;
    state[4] += e;
    state[5] += f;
    state[6] += g;
    state[7] += h;
  }
}
