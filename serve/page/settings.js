// The fields of a SkipConfig on the page. The other fields keep the model's values.

const field = (name) => document.getElementById(name);

/** The defaults of SkipConfig, in the form of a model's card. */
const DEFAULTS = '{"skip": {"retained": 100, "skipped": 156, "select": "similarity", "merge": "similarity"}}';

let others = {};

/** Whether the fields show defaults because no engine has reported the model's SkipConfig yet. */
export let assumed = false;

/**
 * Fill the fields with the SkipConfig in a model's card, or with the defaults if the card has none. With
 * `keepEdits`, fields that no longer have their default stay.
 */
export function show(card, keepEdits = false) {
  const { id, skip, not_loaded: reason } = JSON.parse(card);
  const { retained, skipped, ...rest } = skip ?? {};
  const before = texts(DEFAULTS);
  for (const [name, text] of Object.entries(texts(skip ? card : DEFAULTS))) {
    if (!keepEdits || field(name).value === before[name]) field(name).value = text;
  }
  others = rest;
  assumed = !skip;
  field("assumed").hidden = !assumed;
  field("assumed").textContent = reason
    ? `${id} is not loaded yet: ${reason}. The fields show the defaults until it is loaded.`
    : `No engine has reported the settings of ${id} yet. The fields show the defaults until one does.`;
  explain();
}

/** Offer the names that the endpoint takes, by field. */
export function offer(methods) {
  for (const [name, values] of Object.entries(methods)) {
    field(name).replaceChildren(...values.map((value) => new Option(value)));
  }
}

/** The fields' values in a card; amounts as text, spelled as in the card. */
function texts(card) {
  const { select, merge } = JSON.parse(card).skip;
  const [retained, skipped] = ["retained", "skipped"].map(
    (name) => card.match(new RegExp(`"${name}":\\s*([0-9.eE+-]+)`))[1],
  );
  return { retained, skipped, select, merge };
}

/** The SkipConfig as JSON text. Amounts keep their spelling: 1 is a count, 1.0 a fraction. */
export function asJson() {
  const amounts = ["retained", "skipped"].map((name) => `"${name}":${field(name).value}`);
  const chosen = { ...others, select: field("select").value, merge: field("merge").value };
  return `${JSON.stringify(chosen).slice(0, -1)},${amounts.join()}}`;
}

/** Explain the amounts. */
export function explain() {
  const amounts = ["retained", "skipped"].map((name) => `${name} ${amount(field(name).value)}`);
  field("amounts").textContent = `Tokens of an image: ${amounts.join(", ")}. A whole number is a count; ` +
    "a number with a decimal point is a fraction.";
}

function amount(text) {
  if (!/[.e]/.test(text)) return text || "…";
  return `${Number((Number(text) * 100).toPrecision(4))} %`;
}
