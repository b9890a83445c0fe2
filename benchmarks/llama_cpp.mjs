// Runs a GGUF file in llama.cpp: node llama_cpp.mjs MODULES FILE JOB. JOB is JSON: { texts, ids, prompts, count }.
// Writes in its place the token ids of texts, the next token's probabilities at every 20th of `ids`, and greedy tokens after
// each prompt. One thread: those of ggml wait for each other in loops, which takes minutes on a machine that others use.

import { createRequire } from "node:module";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [modules, file, job] = process.argv.slice(2);
const entry = createRequire(join(modules, "x.js")).resolve("node-llama-cpp");
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(entry));
const { texts, ids, prompts, count } = JSON.parse(readFileSync(job, "utf-8"));

const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.error });
const model = await llama.loadModel({ modelPath: file });
const exact = { experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32", flashAttention: false };

async function sequence(work) {
  const context = await model.createContext({ contextSize: 512, threads: 1, ...exact });
  const result = await work(context.getSequence());
  await context.dispose();
  return result;
}

const plain = { temperature: 1, topK: 0, topP: 1, minP: 0 };
const asked = ids.map((id, i) =>
  i % 20 === 19 ? [id, { generateNext: { probabilities: true, options: plain } }] : id,
);
const steps = await sequence((tokens) => tokens.controlledEvaluate(asked));
const greedy = [];
let seconds = 0;
for (const prompt of prompts) {
  const tokens = await sequence(async (tokens) => {
    const found = [];
    let began;
    for await (const token of tokens.evaluate(prompt, { temperature: 0 })) {
      began ??= performance.now();
      if (found.push(token) === count) break;
    }
    seconds += (performance.now() - began) / 1000;
    return found;
  });
  greedy.push(tokens);
}
const answer = {
  release: llama.llamaCppRelease.release,
  ids: texts.map((text) => model.tokenize(text, true)),
  probabilities: steps.filter((step) => step?.next?.probabilities).map((step) => [...step.next.probabilities]),
  greedy,
  rate: greedy.reduce((sum, tokens) => sum + tokens.length - 1, 0) / seconds,
};
writeFileSync(job, JSON.stringify(answer));
process.exit(0);
