// One of the two panes: an answer and its numbers.

const milliseconds = (value) =>
  value < 1000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(value < 10000 ? 2 : 1)} s`;

const bytes = (value) => {
  if (value < 1024) return `${value} B`;
  const power = Math.min(Math.floor(Math.log2(value) / 10), 3);
  return `${Number((value / 1024 ** power).toPrecision(3))} ${["", "KiB", "MiB", "GiB"][power]}`;
};

const count = (value) => value.toLocaleString("en");

const NUMBERS = {
  first: { label: "First token", format: milliseconds, compared: true },
  total: { label: "Whole answer", format: milliseconds, compared: true },
  prompt: { label: "Prompt tokens", format: count },
  visual: { label: "Visual tokens", format: count },
  retained: { label: "on the full path", format: count, compared: true, part: true },
  skipped: { label: "skipping the FFN", format: count, part: true },
  cached: { label: "kept in the KV cache", format: count, compared: true, part: true },
  kv: { label: "KV cache of the prompt", format: bytes, compared: true },
  answer: { label: "Answer tokens", format: count },
};

/** A stream's usage under the names above. */
const numbersOf = (usage) => ({
  prompt: usage.prompt_tokens,
  visual: usage.visual_tokens.total,
  retained: usage.visual_tokens.retained,
  skipped: usage.visual_tokens.skipped,
  cached: usage.visual_tokens.cached,
  kv: usage.kv_bytes,
  answer: usage.completion_tokens,
});

export class Pane {
  /** `against`: the pane to compare the numbers with. */
  constructor(root, against = null) {
    this.root = root;
    this.against = against;
    this.text = add(root, "p", "answer");
    const list = add(root, "dl", "numbers");
    this.cells = new Map();
    for (const [name, { label, part }] of Object.entries(NUMBERS)) {
      const row = add(list, "div", part ? "part" : "");
      add(row, "dt").textContent = label;
      const cell = add(row, "dd");
      cell.dataset.number = name;
      this.cells.set(name, cell);
    }
    this.note = add(root, "p", "hint");
    this.clear();
  }

  clear() {
    this.root.dataset.state = "empty";
    this.text.textContent = this.note.textContent = "";
    this.numbers = {};
    for (const cell of this.cells.values()) {
      cell.replaceChildren("–");
      delete cell.dataset.value;
    }
  }

  /** Show an answer while it arrives. Throws errors, which the page shows once for both panes. */
  async show(chunks) {
    const begin = performance.now();
    this.root.dataset.state = "writing";
    this.root.ariaBusy = true; // screen readers wait for the whole answer
    try {
      for await (const chunk of chunks) {
        const text = chunk.choices[0]?.delta.content;
        if (text) {
          if (this.numbers.first === undefined) this.#number("first", performance.now() - begin);
          this.text.append(this.text.textContent ? text : text.trimStart());
        }
        if (chunk.usage) this.#ended(chunk.usage, performance.now() - begin);
      }
      this.root.dataset.state = "done";
    } catch (error) {
      this.root.dataset.state = error.name === "AbortError" ? "stopped" : "failed";
      this.note.textContent = error.name === "AbortError" ? "Stopped." : "No answer.";
      throw error;
    } finally {
      this.root.ariaBusy = false;
    }
  }

  #ended(usage, total) {
    this.prefixHit = usage.prefix_hit;
    this.#number("total", total);
    for (const [name, value] of Object.entries(numbersOf(usage))) this.#number(name, value);
    if (!this.text.textContent) this.text.textContent = "(an empty answer)";
    this.note.textContent = usage.prefix_hit
      ? "The image came from the prefix cache: an earlier question used it."
      : "";
    if (this.against) this.#compare();
  }

  #number(name, value) {
    this.numbers[name] = value;
    const cell = this.cells.get(name);
    cell.dataset.value = value;
    cell.replaceChildren(NUMBERS[name].format(value));
  }

  /** Show numbers as multiples of the other pane's; times only if both or neither had the image cached. */
  #compare() {
    const sameCache = this.prefixHit === this.against.prefixHit;
    for (const [name, value] of Object.entries(this.numbers)) {
      const { compared, format } = NUMBERS[name];
      const other = this.against.numbers[name];
      if (!compared || !other || (format === milliseconds && !sameCache)) continue;
      add(this.cells.get(name), "small").textContent = `× ${(value / other).toFixed(2)}`;
    }
  }
}

function add(parent, tag, name = "") {
  const element = document.createElement(tag);
  if (name) element.className = name;
  parent.append(element);
  return element;
}
