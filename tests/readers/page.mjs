// Runs the inspector page in Node on a stand-in for the DOM with just what the page uses: node page.mjs PAGE ADDRESS.
// Prints the status line after opening, after all sections are opened, after each weight is decoded, and after the digests are verified; and all text.

class Element {
  children = [];
  attributes = {};
  listeners = {};
  style = {};
  classList = { add() {}, remove() {}, toggle() {} };
  append(...children) {
    this.children.push(...children);
  }
  replaceChildren(...children) {
    this.children = children;
  }
  setAttribute(key, value) {
    this.attributes[key] = value;
  }
  addEventListener(event, listener) {
    this.listeners[event] = listener;
  }
  #value;
  get value() {
    return this.#value ?? this.children[0]?.textContent; // of a select: the first option
  }
  set value(value) {
    this.#value = value;
  }
  get textContent() {
    return this.children.map((child) => child.textContent ?? child).join(" ");
  }
  set textContent(text) {
    this.children = [text];
  }
  find(test) {
    return (test(this) ? [this] : []).concat(this.children.flatMap((child) => child.find?.(test) ?? []));
  }
}

const ids = Object.fromEntries(["status", "report", "open", "address", "folder"].map((id) => [id, new Element()]));
globalThis.HTMLTableCellElement = class extends Element {};
globalThis.document = {
  body: new Element(),
  addEventListener() {},
  getElementById: (id) => ids[id],
  createElement: (tag) => Object.assign(tag === "td" ? new HTMLTableCellElement() : new Element(), { tag }),
  createElementNS: (_, tag) => Object.assign(new Element(), { tag }),
};
const [page, address] = process.argv.slice(2);
globalThis.location = { search: `?repo=${encodeURIComponent(address)}`, href: address };

async function told(pattern) {
  const end = Date.now() + 30_000;
  while (!pattern.test(ids.status.textContent)) {
    if (Date.now() > end) throw new Error(`the page says ${ids.status.textContent}`);
    await new Promise((done) => setTimeout(done, 5));
  }
  return ids.status.textContent;
}

await import(page);
const opened = await told(/fetched\.$|\[/);
const result = { opened, decoded: [] };
const sections = ids.report.find((element) => element.tag === "details");
for (const details of sections) {
  details.listeners.toggle();
  for (const end = Date.now() + 30_000; !details.children[1].children.length; ) {
    if (Date.now() > end || /\[/.test(ids.status.textContent)) throw new Error(`the page says ${ids.status.textContent}`);
    await new Promise((done) => setTimeout(done, 5));
  }
}
if (sections.length) {
  result.whole = ids.status.textContent;
  const [verify, decode] = ids.report.find((element) => element.tag === "button");
  const [select] = ids.report.find((element) => element.tag === "select");
  for (const option of select.find((element) => element.tag === "option")) {
    select.value = option.textContent;
    decode.listeners.click();
    result.decoded.push(await told(/^Decoded .* in |\[/));
    ids.status.textContent = "";
  }
  verify.listeners.click();
  result.verified = await told(/^Digests|are not what|\[/);
}
process.stdout.write(JSON.stringify({ ...result, text: ids.report.textContent }));
