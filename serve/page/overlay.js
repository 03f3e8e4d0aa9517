// The patches of an image, drawn over it: retained, skipped, merged into another, or dropped.

const FATES = {
  retained: "Retained: attention and FFN",
  skipped: "Skipped: attention only",
  merged: "Merged into another token",
  dropped: "Dropped",
};

const LINES = "Lines from merged patches to their tokens";

/** Draws overlays into `panels`, switches for their layers into `legend`, and describes a patch in `status`. */
export class OverlayView {
  constructor(panels, legend, status) {
    Object.assign(this, { panels, legend, status });
    this.hidden = new Set(["lines"]);
    panels.addEventListener("pointerover", (event) => this.#point(event.target.dataset?.patch));
    panels.addEventListener("pointerleave", () => this.#point(undefined));
    panels.addEventListener("keydown", (event) => this.#step(event));
  }

  /** Show an image without an overlay. */
  clear(url) {
    this.url = url;
    this.panels.replaceChildren(this.#panel());
    this.panels.hidden = false;
    this.legend.hidden = true;
    this.status.textContent = "";
  }

  /** Draw the API's overlay over the image. */
  show(overlay) {
    this.patches = locate(overlay);
    this.groups = Map.groupBy(
      this.patches.filter(({ into }) => into !== null),
      ({ into }) => into,
    );
    const drawings = panelsOf(overlay.views).map((views) => {
      const panel = this.#panel();
      panel.append(this.#drawing(overlay.size, views));
      return panel;
    });
    this.panels.replaceChildren(...drawings);
    this.#drawLegend();
    this.status.textContent = "Point at a patch, or move with the arrow keys.";
  }

  #panel() {
    const panel = document.createElement("div");
    const image = document.createElement("img");
    Object.assign(image, { src: this.url, alt: "The chosen image" });
    panel.className = "panel";
    panel.append(image);
    return panel;
  }

  #drawing([width, height], views) {
    const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img" });
    drawing.setAttribute("aria-label", "Patches of the image; move between them with the arrow keys");
    const here = this.patches.filter(({ view, box }) => box && views.includes(view));
    const layers = Object.fromEntries(
      ["dropped", "merged", "skipped", "retained", "lines"].map((name) => [
        name,
        drawing.appendChild(svg("g", { class: name })),
      ]),
    );
    for (const patch of here) {
      const [left, top, right, bottom] = patch.box;
      const rectangle = { x: left, y: top, width: right - left, height: bottom - top };
      patch.shape = svg("rect", { ...rectangle, "data-patch": patch.number });
      layers[patch.fate].append(patch.shape);
      const into = this.patches[patch.into];
      if (into?.box && views.includes(into.view)) {
        const [from, to] = [middle(patch.box), middle(into.box)];
        patch.line = svg("line", { x1: from[0], y1: from[1], x2: to[0], y2: to[1] });
        layers.lines.append(patch.line);
      }
    }
    return drawing;
  }

  /** Draw a switch for each layer that is not empty. */
  #drawLegend() {
    const counts = Object.groupBy(this.patches, ({ fate }) => fate);
    const rows = Object.entries(FATES).filter(([fate]) => counts[fate]);
    const switches = rows.map(([fate, label]) => this.#switch(fate, label, counts[fate].length));
    if (this.groups.size) switches.push(this.#switch("lines", LINES));
    this.legend.replaceChildren(this.legend.querySelector("legend"), ...switches);
    this.legend.hidden = false;
  }

  #switch(layer, text, count) {
    const label = document.createElement("label");
    const box = Object.assign(document.createElement("input"), {
      type: "checkbox",
      checked: !this.hidden.has(layer),
    });
    const swatch = Object.assign(document.createElement("span"), { className: `swatch ${layer}` });
    const number = Object.assign(document.createElement("span"), { className: "count" });
    if (count !== undefined) {
      number.textContent = count;
      number.dataset.count = layer;
    }
    label.append(box, swatch, text, number);
    const apply = () => {
      this.panels.classList.toggle(`no-${layer}`, !box.checked);
      this.hidden[box.checked ? "delete" : "add"](layer);
    };
    box.addEventListener("change", apply);
    apply();
    return label;
  }

  #point(number) {
    for (const marked of this.panels.querySelectorAll(".at, .group")) marked.classList.remove("at", "group");
    this.at = this.patches?.[number];
    if (!this.at) return;
    const host = this.at.into ?? this.at.number;
    const group = [this.patches[host], ...(this.groups.get(host) ?? [])];
    for (const { shape, line } of group.length > 1 ? group : []) {
      shape?.classList.add("group");
      line?.classList.add("group");
    }
    this.at.shape.classList.add("at");
    this.status.textContent = this.#describe(this.at);
  }

  #describe(patch) {
    const where = (other) => `row ${other.row + 1}, column ${other.column + 1}`;
    const start = `${where(patch).replace("r", "R")}: ${patch.fate}`;
    if (patch.into !== null) {
      const host = this.patches[patch.into];
      const elsewhere = host.view === patch.view ? "" : " of another view";
      return `${start} into ${where(host)}${elsewhere}, which is ${host.fate}`;
    }
    const merged = this.groups.get(patch.number)?.length;
    return merged ? `${start}, with ${merged} merged into it` : start;
  }

  /** Move to the next patch in the direction of an arrow key. */
  #step(event) {
    const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const drawing = event.target.closest("svg");
    if (!direction || !drawing) return;
    event.preventDefault();
    const here = this.patches.filter(({ shape }) => shape && drawing.contains(shape));
    if (!here.includes(this.at)) return this.#point(here[0]?.number);
    const [x, y] = middle(this.at.box);
    const ahead = here
      .map((patch) => {
        const [dx, dy] = [middle(patch.box)[0] - x, middle(patch.box)[1] - y];
        const along = dx * direction[0] + dy * direction[1];
        const aside = Math.abs(dx * direction[1]) + Math.abs(dy * direction[0]);
        return { number: patch.number, along, far: along + 3 * aside };
      })
      .filter(({ along }) => along > 0.5);
    if (ahead.length) this.#point(ahead.reduce((best, other) => (other.far < best.far ? other : best)).number);
  }
}

/** Return the patches with their number, view, row and column. */
function locate({ views, patches }) {
  const positions = views.flatMap((view, index) => {
    const width = view.columns + view.row_end;
    const lead = Array(view.lead).fill({ view: index, row: -1, column: -1 });
    const grid = Array.from({ length: view.rows * width }, (_, number) => ({
      view: index,
      row: Math.floor(number / width),
      column: number % width,
    }));
    return [...lead, ...grid];
  });
  return patches.map((patch, number) => ({ ...patch, ...positions[number], number }));
}

/** Distribute views over panels so that those of a panel do not overlap; returns their numbers. */
function panelsOf(views) {
  const panels = [];
  views.forEach((view, number) => {
    const free = panels.find((panel) => panel.every((other) => !overlap(views[other].box, view.box)));
    if (free) free.push(number);
    else panels.push([number]);
  });
  return panels;
}

function overlap(a, b) {
  const shared = [0, 1].map((axis) => Math.min(a[axis + 2], b[axis + 2]) - Math.max(a[axis], b[axis]));
  return shared.every((length) => length > 1e-6);
}

const middle = ([left, top, right, bottom]) => [(left + right) / 2, (top + bottom) / 2];

function svg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
