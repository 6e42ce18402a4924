// What an answer of the service says in words and in lengths of bars.

import { element } from "./common.js";

const PARTS = { likeness: "like it in meaning", words: "the same words", taste: "bought with its like" };
const PARTS_OF_PICTURE = { likeness: "like your picture", taste: "bought with its like" };
export const partsOf = (source) => Object.entries(source === "picture" ? PARTS_OF_PICTURE : PARTS);

export const SOURCES = {
  history: "From this customer's history, best first.",
  items: "From the items you like, best first.",
  text: "From your words, best first.",
  picture: "From your picture, the likest first.",
  popular: "Nothing is known about the taste: what most people chose.",
  similar: "The likest first.",
};
export const VARIED = {
  history: "From this customer's history, with variety.",
  items: "From the items you like, with variety.",
  text: "From your words, with variety.",
  popular: "Nothing is known about the taste: what most people chose, with variety.",
  similar: "The likest first, with variety.",
};
export const RULES = { diversity: "Variety" };

// lengths of the bars, the best item's being 1: chances where all have one, else what the items are ranked by
export function lengths(items) {
  const values = items.map((item) => (items.every((each) => each.probability != null) ? item.probability : item.score));
  const top = Math.max(...values);
  const low = Math.min(0, ...values);
  return values.map((value) => (top > low ? Math.max(0, (value - low) / (top - low)) : 1));
}

export function meter(name, share) {
  const fill = element("span");
  fill.style.width = `${100 * Math.min(1, share)}%`;
  return element("div", { className: "meter" },
    element("span", { text: name, title: name }), element("span", { className: "bar", "aria-hidden": "true" }, fill));
}

export function why(item, source) {
  const first = item.reasons?.[0];
  if (source === "text" && item.parts) {
    const { likeness, words, taste } = item.parts;
    if (first && taste > likeness + words) return `bought with ${first.title}`;
    if (words > likeness) return item.cold ? "new, has your words" : "has your words";
    return item.cold ? "new, fits your words" : "fits your words";
  }
  if (source === "picture" && item.parts) {
    return first && item.parts.taste > item.parts.likeness ? `bought with ${first.title}` : "like your picture";
  }
  if (first) return `because of ${first.title}`;
  if (source === "popular") return `chosen ${item.score === 1 ? "once" : `${item.score.toLocaleString("en")} times`}`;
  if (source === "similar") return item.cold ? "like it by its text" : "like it";
  if (source === "text") return item.cold ? "new, fits your words" : "fits your words";
  return item.cold ? "new, fits the taste" : "fits the taste as a whole";
}
