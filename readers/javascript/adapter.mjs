// tqformat.mjs behind the protocol of the conformance suite, conformance/PROTOCOL.md. Licence: Apache-2.0.
//
//   python -m conformance run --entrypoint "node readers/javascript/adapter.mjs"

import { open } from "node:fs/promises";
import { createInterface } from "node:readline";
import { ELEMENTS, FEATURES, TQFormatError, directory, openRepository, toNumbers } from "./tqformat.mjs";

const INLINE = 65536; // bytes of a tensor that go into the answer; larger ones go to the file `out`
const GRADE = 40; // binary64 throughout [TQ-FUSE-2]

function start() {
  const about = { protocol: 1, implementation: "tqformat.mjs", version: "1.0.0" };
  return { ...about, features: FEATURES, operations: ["load", "product"] };
}

/** All weights, and the aliases after them. The digests come first, though a reader may leave them to validators. */
async function load({ path, out }) {
  const repository = await openRepository(directory(path));
  await repository.verify();
  const tensors = new Map();
  let file = null;
  let offset = 0;
  try {
    for (const name of repository.manifest.tensors.keys()) {
      const { dtype, shape, bytes } = await repository.decode(name);
      if (bytes.length <= INLINE) {
        tensors.set(name, { dtype, shape, base64: Buffer.from(bytes.buffer).toString("base64") });
        continue;
      }
      file ??= await open(out, "wx");
      await file.writeFile(bytes);
      tensors.set(name, { dtype, shape, offset });
      offset += bytes.length;
    }
  } finally {
    await file?.close();
  }
  for (const [alias, name] of repository.manifest.tied_weights) tensors.set(alias, tensors.get(name));
  return { tensors };
}

async function product({ path, weight, x }) {
  const repository = await openRepository(directory(path));
  const y = await repository.product(weight, toNumbers(Buffer.from(x.base64, "base64"), x.dtype));
  const bytes = Buffer.alloc(y.length * ELEMENTS.F64.size);
  y.forEach((value, i) => bytes.writeDoubleLE(value, i * ELEMENTS.F64.size));
  return { y: { dtype: "F64", shape: [y.length], base64: bytes.toString("base64") }, grade: GRADE };
}

/** JSON of an answer. A Map becomes an object by hand, since a weight may be called `__proto__`. */
function write(value) {
  if (!(value instanceof Map)) return JSON.stringify(value);
  return `{${Array.from(value, ([key, item]) => `${JSON.stringify(key)}:${JSON.stringify(item)}`).join()}}`;
}

async function answer(request) {
  const operations = { start, load, product };
  if (!Object.hasOwn(operations, request.command)) return { status: "skipped", reason: `no ${request.command}` };
  try {
    return { status: "results", ...(await operations[request.command](request)) };
  } catch (error) {
    if (!(error instanceof TQFormatError)) return { status: "errored", message: String(error.stack) };
    return { status: "rejection", code: error.code, where: error.where, message: error.message };
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  if (request.command === "stop") break;
  const fields = Object.entries(await answer(request)).map(([key, value]) => `${JSON.stringify(key)}:${write(value)}`);
  process.stdout.write(`{${fields.join()}}\n`);
}
