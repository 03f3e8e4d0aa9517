// The fields of a SkipConfig that the page shows; the others stay what the model runs under.

const field = (name) => document.getElementById(name);

/** A SkipConfig's own values, as a card has them. */
const DEFAULTS = '{"skip": {"retained": 100, "skipped": 156, "select": "similarity", "merge": "similarity"}}';

let others = {};

/** The fields show defaults: no engine has said yet what the model runs under. */
export let assumed = false;

/**
 * Fill the fields with the SkipConfig in a model's card, or with the defaults if it has none yet; with `typed`
 * only those that nobody has changed since they were filled with defaults.
 */
export function show(card, typed = false) {
  const { id, skip, not_loaded: reason } = JSON.parse(card);
  const { retained, skipped, ...rest } = skip ?? {};
  const before = texts(DEFAULTS);
  for (const [name, text] of Object.entries(texts(skip ? card : DEFAULTS))) {
    if (!typed || field(name).value === before[name]) field(name).value = text;
  }
  others = rest;
  assumed = !skip;
  field("assumed").hidden = !assumed;
  field("assumed").textContent = reason
    ? `${id} is not loaded yet: ${reason}. The settings are a SkipConfig’s defaults until it is.`
    : `No engine has said yet what ${id} runs under: the settings are a SkipConfig’s defaults until one has.`;
  explain();
}

/** The fields' values in a card, amounts as they are written there. */
function texts(card) {
  const { select, merge } = JSON.parse(card).skip;
  const [retained, skipped] = ["retained", "skipped"].map(
    (name) => card.match(new RegExp(`"${name}":\\s*([0-9.eE+-]+)`))[1],
  );
  return { retained, skipped, select, merge };
}

/** The SkipConfig as JSON text: amounts go out as they were typed, 1 a count and 1.0 a fraction. */
export function asJson() {
  const amounts = ["retained", "skipped"].map((name) => `"${name}":${field(name).value}`);
  const chosen = { ...others, select: field("select").value, merge: field("merge").value };
  return `${JSON.stringify(chosen).slice(0, -1)},${amounts.join()}}`;
}

/** Say what the amounts mean. */
export function explain() {
  const said = ["retained", "skipped"].map((name) => `${name} ${amount(field(name).value)}`);
  field("amounts").textContent = `Of an image’s tokens: ${said.join(", ")}. A whole number is a count; ` +
    "with a decimal point it is a fraction.";
}

function amount(text) {
  if (!/[.e]/.test(text)) return text || "…";
  return `${Number((Number(text) * 100).toPrecision(4))} %`;
}
