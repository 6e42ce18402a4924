// The page: asks the service at its own origin, and writes text with textContent alone.

const REASONS = 3;
const ITEMS = 10;
const TYPING_PAUSE_MS = 150;
const KEY = "recbole-llm-key";

const $ = (id) => document.getElementById(id);
const chosen = new Map(); // id -> title, in the order chosen
let asked = 0; // number of the latest question: an earlier answer that comes later is dropped

function element(tag, { text, className, ...rest } = {}, ...children) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  for (const [name, value] of Object.entries(rest)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

async function call(path, { method = "GET", body } = {}) {
  const headers = {};
  if (body !== undefined) headers["content-type"] = "application/json";
  const key = sessionStorage.getItem(KEY);
  if (key) headers["x-api-key"] = key;
  const response = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  const content = await response.json().catch(() => ({}));
  if (response.status === 401) {
    $("key-form").hidden = false;
    $("key").focus();
  }
  if (!response.ok) throw new Error(content.detail ?? `The service answered ${response.status}.`);
  return content;
}

function meter(name, value, largest) {
  const fill = element("span", { className: value < 0 ? "minus" : "" });
  fill.style.width = `${Math.min(100, (100 * Math.abs(value)) / largest)}%`;
  return element(
    "div",
    { className: "meter" },
    element("span", { className: "name", text: name, title: name }),
    element("span", { className: "bar" }, fill),
    element("span", { className: "value", text: value.toFixed(2) }),
  );
}

function describe(attributes) {
  return Object.entries(attributes)
    .map(([name, value]) => `${name}: ${Array.isArray(value) ? value.join(", ") : value}`)
    .join(" · ");
}

function card(item, scale, added) {
  const node = element("li", { className: item.id === added ? "added" : "", "data-id": item.id });
  const badge = element("span", {
    className: "badge",
    text: item.cold ? "new: known by its text" : "known",
    title: item.cold ? "placed by its text alone" : "placed by what people chose",
  });
  node.append(element("div", { className: "title" }, element("strong", { text: item.title }), badge));
  const attributes = element("p", { className: "attributes" });
  node.append(attributes);
  call(`v1/items/${encodeURIComponent(item.id)}`)
    .then((known) => (attributes.textContent = describe(known.attributes)))
    .catch(() => attributes.remove());
  node.append(meter("score", item.score, scale));
  if (item.probability != null) {
    const chance = `${(100 * item.probability).toPrecision(2)}%`;
    node.append(element("p", { className: "because", text: `chance that it is among the next choices: ${chance}` }));
  }
  if (item.reasons?.length) {
    node.append(element("p", { className: "because", text: "because you like" }));
    for (const reason of item.reasons) node.append(meter(reason.title, reason.contribution, scale));
    node.append(meter("everything else", item.rest + item.bias, scale));
  }
  const similar = element("button", { className: "similar", text: "Similar items", type: "button" });
  similar.addEventListener("click", () =>
    show(`Similar to ${item.title}`, () => call(`v1/items/${encodeURIComponent(item.id)}/similar?k=${ITEMS}`)),
  );
  node.append(similar);
  return node;
}

const SOURCES = {
  history: "From this user's history.",
  items: "From the items chosen.",
  text: "From the words.",
  popular: "Nothing is known of them: what most people chose.",
  similar: "By likeness of the items.",
};

async function show(title, ask, added) {
  const mine = ++asked;
  $("answer-title").textContent = title;
  say("…");
  const started = performance.now();
  try {
    const answer = await ask();
    if (mine !== asked) return;
    const numbers = answer.items.flatMap((item) => [
      item.score,
      (item.rest ?? 0) + (item.bias ?? 0),
      ...(item.reasons ?? []).map((reason) => reason.contribution),
    ]);
    const scale = Math.max(1e-9, ...numbers.map(Math.abs));
    $("answer").replaceChildren(...answer.items.map((item) => card(item, scale, added)));
    const notes = [SOURCES[answer.source]];
    if (!answer.items.length) notes.push("Nothing is left to recommend.");
    if (answer.unknown.length) notes.push(`Unknown: ${answer.unknown.join(", ")}.`);
    if (answer.truncated) notes.push("The text is longer than the encoder reads.");
    say(notes.join(" "));
    $("latency").textContent = `· ${Math.round(performance.now() - started)} ms`;
    $("model").textContent = `export ${answer.model}, change ${answer.overlay_seq}`;
  } catch (error) {
    if (mine !== asked) return;
    $("answer").replaceChildren();
    say(error.message, true);
  }
}

const recommend = (title, subject, added) =>
  show(title, () => call("v1/recommend", { method: "POST", body: { ...subject, k: ITEMS, explain: REASONS } }), added);

function recommendChosen() {
  if (chosen.size) recommend("For the items chosen", { items: [...chosen.keys()] });
}

function showChosen() {
  $("chosen").replaceChildren(
    ...[...chosen].map(([id, title]) => {
      const button = element("button", { text: `${title} ×`, type: "button", "aria-label": `Remove ${title}` });
      button.addEventListener("click", () => {
        chosen.delete(id);
        showChosen();
        recommendChosen();
        $("pick").focus();
      });
      return element("li", {}, button);
    }),
  );
}

function choose(id, title) {
  chosen.set(id, title);
  closeOptions();
  $("pick").value = "";
  showChosen();
  recommendChosen();
}

function closeOptions() {
  $("options").hidden = true;
  $("options").replaceChildren();
  $("pick").setAttribute("aria-expanded", "false");
  $("pick").removeAttribute("aria-activedescendant");
}

let typing;
$("pick").addEventListener("input", () => {
  clearTimeout(typing);
  const text = $("pick").value.trim();
  if (!text) return closeOptions();
  typing = setTimeout(async () => {
    try {
      const found = await call(`v1/items?limit=8&search=${encodeURIComponent(text.slice(0, 256))}`);
      if ($("pick").value.trim() !== text) return;
      $("options").replaceChildren(
        ...found.items.map((item, at) => {
          const option = element("li", { role: "option", id: `option-${at}`, text: item.title, "aria-selected": "false" });
          option.addEventListener("mousedown", (event) => {
            event.preventDefault();
            choose(item.id, item.title);
          });
          option.choose = () => choose(item.id, item.title);
          return option;
        }),
      );
      $("options").hidden = !found.items.length;
      $("pick").setAttribute("aria-expanded", String(found.items.length > 0));
    } catch (error) {
      say(error.message, true);
    }
  }, TYPING_PAUSE_MS);
});

$("pick").addEventListener("keydown", (event) => {
  const options = [...$("options").children];
  if (event.key === "Escape") return closeOptions();
  if (!options.length) return;
  const at = options.findIndex((option) => option.getAttribute("aria-selected") === "true");
  if (event.key === "Enter") {
    event.preventDefault();
    options[Math.max(at, 0)].choose();
  } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    const next = (at + (event.key === "ArrowDown" ? 1 : -1) + options.length) % options.length;
    options.forEach((option, i) => option.setAttribute("aria-selected", String(i === next)));
    options[next].scrollIntoView({ block: "nearest" });
    $("pick").setAttribute("aria-activedescendant", options[next].id);
  }
});
$("pick").addEventListener("blur", closeOptions);

$("text-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (text) recommend(`For “${text.slice(0, 80)}”`, { text });
});

$("user-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const user = $("user").value.trim();
  if (user) recommend(`For user ${user.slice(0, 80)}`, { user, fallback: "popular" });
});

$("add-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const id = $("new-id").value;
  const text = $("new-text").value.trim();
  try {
    await call(`v1/items/${encodeURIComponent(id)}`, { method: "PUT", body: { title: $("new-title").value, text } });
    await recommend(`With the new item, for its text`, { text }, id);
    const at = [...$("answer").children].findIndex((node) => node.dataset.id === id);
    say(at < 0 ? `Added; it is not among the first ${ITEMS} here.` : `Added; it is number ${at + 1}.`);
  } catch (error) {
    say(error.message, true);
  }
});

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value);
  $("key-form").hidden = true;
  load();
});

async function load() {
  try {
    const model = await call("v1/model");
    $("model").textContent = `export ${model.export_id}, ${model.counts.items} items`;
    const hasText = model.encoder_state === "ready" || model.encoder_state === "loading";
    for (const id of ["text-form", "add"]) $(id).hidden = !hasText;
    say("Choose items or write what you like.");
  } catch (error) {
    say(error.message, true);
  }
}

load();
