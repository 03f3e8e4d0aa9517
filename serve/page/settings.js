// The fields of a SkipConfig that the page shows; the others stay what the model runs under.

const field = (name) => document.getElementById(name);

let others = {};

/** Fill the fields with the SkipConfig in a model's card. */
export function show(card) {
  const { retained, skipped, ...rest } = JSON.parse(card).skip;
  others = rest;
  for (const name of ["retained", "skipped"]) {
    field(name).value = card.match(new RegExp(`"${name}":\\s*([0-9.eE+-]+)`))[1];
  }
  for (const name of ["select", "merge"]) field(name).value = rest[name];
  explain();
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
