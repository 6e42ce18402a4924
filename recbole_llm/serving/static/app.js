// The page: asks the service at its own origin, and writes text with textContent alone.

import { RULES, SOURCES, VARIED, lengths, meter, partsOf, why } from "./answer.js";
import { $, KEY, button, call, count, element, itemPath, patiently, percent, say } from "./common.js";
import { base64, problemOf, shown as shownPicture, takePictures, thumb } from "./pictures.js";

const FIRST = 10;
const MOST = 100;
const REASONS = 3;
const TYPING_PAUSE_MS = 150;
const SLIDING_PAUSE_MS = 250;

const liked = new Map(); // id -> title, in the order chosen
const filters = new Map(); // attribute -> {condition, text}
let attributes = {};
let hasText = false;
let hasImages = false; // items have small pictures
let takesImages = false; // pictures can be asked for and put
let subject = null; // what the list answers: {title, ask(k, wanted)}
let shown = FIRST;
let asked = 0; // number of the latest question: an earlier answer that comes later is dropped

// ------------------------------------------------------------------ the list

function line(item, rank, length, source, added) {
  const fill = element("span");
  fill.style.width = `${100 * length}%`;
  const about = element("div", { className: "about" });
  const details = element("details", {},
    element("summary", {},
      element("span", { className: "rank", text: rank }),
      ...(hasImages ? [thumb(item)] : []),
      element("span", { className: "name", text: item.title, title: item.title }),
      element("span", { className: "why", text: why(item, source) }),
      element("span", { className: "bar", "aria-hidden": "true" }, fill),
      element("span", { className: "chance", text: item.probability == null ? "" : percent(item.probability) })),
    about);
  details.addEventListener("toggle", () => details.open && !about.hasChildNodes() && describe(about, item, source));
  return element("li", { className: item.id === added ? "added" : "", "data-id": item.id }, details);
}

function describe(about, item, source) {
  if (item.probability != null) {
    about.append(element("p", { text: `Chance that it is among the next choices: ${percent(item.probability)}` }));
  }
  if (item.parts) {
    for (const [part, name] of partsOf(source)) about.append(meter(name, item.parts[part] / item.score));
  }
  if (item.reasons?.length) {
    about.append(element("p", { className: "dim", text: item.parts ? `Its buyers chose these, which are like your ${source === "picture" ? "picture" : "words"}:` : "What speaks for it most:" }));
    const most = item.reasons[0].contribution;
    for (const reason of item.reasons) about.append(meter(reason.title, reason.contribution / most));
  }
  for (const { rule, place } of item.rules ?? []) {
    if (place) about.append(element("p", { text: `${RULES[rule] ?? rule}: by score alone it would be number ${place}.` }));
  }
  if (item.cold) about.append(element("p", { text: `Nobody chose it yet: it is placed by its text${hasImages ? " or picture" : ""}.` }));
  const known = element("div");
  about.append(known, element("div", { className: "buttons" },
    button("Similar items", () => showSimilar(item)),
    button(liked.has(item.id) ? "Liked" : "I like this", () => like(item.id, item.title))));
  call(itemPath(item.id)).then((full) => {
    const list = element("dl", {}, element("dt", { text: "id" }), element("dd", { text: full.id }));
    for (const [name, value] of Object.entries(full.attributes)) {
      list.append(element("dt", { text: name }), element("dd", { text: Array.isArray(value) ? value.join(", ") : value }));
    }
    if (full.text) known.append(element("p", { text: full.text.length > 600 ? `${full.text.slice(0, 600)}…` : full.text }));
    known.append(list);
  }, (error) => known.append(element("p", { className: "dim", text: error.message })));
}

function notes(answer, wanted) {
  const varied = wanted.diversity && VARIED[answer.source];
  const found = [answer.items.length ? varied || SOURCES[answer.source] : "Nothing is left to show."];
  const searched = answer.source === "text" && answer.items.length > 0;
  if (searched && answer.items.every((item) => item.parts?.words === 0)) found.push("No item here has these words.");
  if (!answer.items.length && wanted.filter) found.push("Take a filter away.");
  else if (answer.items.length < shown && wanted.filter) found.push("The filters leave no more.");
  if (answer.source === "picture" && wanted.diversity) found.push("Variety does not apply here.");
  if (answer.unknown?.length) found.push(`Unknown: ${answer.unknown.join(", ")}.`);
  if (answer.truncated) found.push("The text is longer than the encoder reads.");
  return found.join(" ");
}

async function show(what, added) {
  subject = what;
  const mine = ++asked;
  const wanted = wishes(); // by the time of the answer others may be set
  $("answer-title").textContent = what.title;
  $("answer").classList.add("waiting");
  $("results").setAttribute("aria-busy", "true");
  say("Looking …");
  const started = performance.now();
  try {
    const answer = await patiently(() => what.ask(shown, wanted), () => mine === asked);
    if (mine !== asked) return;
    const bars = lengths(answer.items);
    $("answer").replaceChildren(
      ...answer.items.map((item, at) => line(item, at + 1, bars[at], answer.source, added)));
    say(notes(answer, wanted));
    $("more").hidden = answer.items.length < shown || shown >= MOST;
    $("latency").textContent = `· ${Math.round(performance.now() - started)} ms`;
    $("model").textContent = `export ${answer.model}, change ${answer.overlay_seq}`;
  } catch (error) {
    if (mine !== asked) return;
    $("answer").replaceChildren();
    $("more").hidden = true;
    say(error.message, true);
  } finally {
    if (mine === asked) {
      $("answer").classList.remove("waiting");
      $("results").removeAttribute("aria-busy");
    }
  }
}

const variety = () => Number($("variety").value);

function wishes() {
  const filter = Object.fromEntries([...filters].map(([name, { condition }]) => [name, condition]));
  return { ...(filters.size && { filter }), ...(variety() && { diversity: { weight: variety() / $("variety").max } }) };
}

function recommend(title, who, added) {
  shown = FIRST;
  const ask = (k, wanted) => call("v1/recommend", { method: "POST", body: { ...who, ...wanted, k, explain: REASONS } });
  return show({ title, ask }, added);
}

function showSimilar(item) {
  shown = FIRST;
  hideSubject();
  const ask = (k, wanted) => call("v1/recommend", { method: "POST", body: { item: item.id, ...wanted, k } });
  show({ title: `Like ${item.title}`, ask });
  $("results").focus();
}

$("more").addEventListener("click", () => {
  shown = Math.min(2 * shown, MOST);
  show(subject);
});

// ------------------------------------------------------------------ who is asked for

function hideSubject() {
  $("subject").hidden = true;
}

function showSubject(title, note, entries) {
  $("subject-title").textContent = title;
  $("subject-note").textContent = note;
  $("history").replaceChildren(...entries);
  $("subject").hidden = false;
  letHistoryScroll();
}

// on a phone the history is a row that scrolls: by keyboard too
function letHistoryScroll() {
  const history = $("history");
  if (history.scrollWidth > history.clientWidth) history.tabIndex = 0;
  else history.removeAttribute("tabindex");
}

addEventListener("resize", letHistoryScroll);

function showCustomer(user) {
  const order = user.ordered ? "the newest first" : "in no order";
  const part = user.items.length < user.interactions ? `${user.items.length} of ${count(user.interactions, "choice")}` : count(user.interactions, "choice");
  showSubject(`Customer ${user.id}`, user.interactions ? `${part}, ${order}` : "No choice is known.",
    user.items.map((item) => element("li", { text: item.title })));
  recommend(`For customer ${user.id}`, { user: user.id, fallback: "popular" });
}

function showLiked() {
  if (!liked.size) {
    hideSubject();
    $("answer-title").textContent = "What are you looking for?";
    $("answer").replaceChildren();
    $("more").hidden = true;
    subject = null;
    asked++;
    return welcome();
  }
  showSubject("You like", count(liked.size, "item"), [...liked].map(([id, title]) =>
    element("li", {}, element("span", { text: title }),
      button("×", () => { liked.delete(id); showLiked(); $("query").focus(); }, { "aria-label": `Remove ${title}` }))));
  recommend("For what you like", { items: [...liked.keys()], fallback: "popular" });
}

function like(id, title) {
  liked.delete(id);
  liked.set(id, title);
  showLiked();
}

function showPicture(file) {
  const problem = problemOf(file);
  if (problem) return say(problem, true);
  $("query").value = "";
  showSubject("Your picture", file.name, [shownPicture(file)]);
  shown = FIRST;
  const ask = (k, { filter }) => {
    const narrowed = filter ? `&filter=${encodeURIComponent(JSON.stringify(filter))}` : "";
    return call(`v1/recommend/image?k=${k}&explain=${REASONS}${narrowed}`, { method: "POST", body: file });
  };
  show({ title: "Like your picture", ask });
  $("results").focus();
}

function showWords(text) {
  hideSubject();
  recommend(`For “${text.length > 80 ? `${text.slice(0, 80)}…` : text}”`, { text });
}

// ------------------------------------------------------------------ the search box

function closeOptions() {
  $("options").hidden = true;
  $("options").replaceChildren();
  $("query").setAttribute("aria-expanded", "false");
  $("query").removeAttribute("aria-activedescendant");
}

const find = (text) => call(`v1/items?limit=8&search=${encodeURIComponent(text.slice(0, 256))}`);
const customer = (text) => call(`v1/users?id=${encodeURIComponent(text.slice(0, 256))}`);

function option(name, kind, choose) {
  const node = element("li", { role: "option", "aria-selected": "false" }, element("span", { text: name }), element("span", { text: kind }));
  node.choose = () => {
    closeOptions();
    choose();
  };
  node.addEventListener("mousedown", (event) => {
    event.preventDefault();
    node.choose();
  });
  return node;
}

let typing;
$("query").addEventListener("input", () => {
  clearTimeout(typing);
  const text = $("query").value.trim();
  if (!text) return closeOptions();
  typing = setTimeout(async () => {
    try {
      const [items, users] = await Promise.all([find(text), customer(text)]);
      if ($("query").value.trim() !== text || document.activeElement !== $("query")) return;
      const options = [
        ...users.users.map((user) => option(`Customer ${user.id}`, count(user.interactions, "choice"), () => showCustomer(user))),
        ...items.items.map((item) => option(item.title, "like this", () => {
          $("query").value = "";
          like(item.id, item.title);
        })),
      ];
      options.forEach((node, at) => (node.id = `option-${at}`));
      $("options").replaceChildren(...options);
      $("options").hidden = !options.length;
      $("query").setAttribute("aria-expanded", String(options.length > 0));
    } catch (error) {
      say(error.message, true);
    }
  }, TYPING_PAUSE_MS);
});

$("query").addEventListener("keydown", (event) => {
  const options = [...$("options").children];
  if (event.key === "Escape") return closeOptions();
  if (!options.length) return;
  const at = options.findIndex((node) => node.getAttribute("aria-selected") === "true");
  if (event.key === "Enter" && at >= 0) {
    event.preventDefault();
    options[at].choose();
  } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    const down = event.key === "ArrowDown";
    const next = at < 0 ? (down ? 0 : options.length - 1) : (at + (down ? 1 : -1) + options.length) % options.length;
    options.forEach((node, i) => node.setAttribute("aria-selected", String(i === next)));
    options[next].scrollIntoView({ block: "nearest" });
    $("query").setAttribute("aria-activedescendant", options[next].id);
  }
});
$("query").addEventListener("blur", closeOptions);

$("search-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  clearTimeout(typing);
  closeOptions();
  const text = $("query").value.trim();
  if (!text) return say("Write what you look for.");
  try {
    const [user] = text.length <= 256 ? (await customer(text)).users : [];
    if (user) return showCustomer(user);
    if (hasText) return showWords(text);
    const [item] = (await find(text)).items; // no encoder reads words here: titles alone are searched
    if (item) return like(item.id, item.title);
    hideSubject();
    $("answer").replaceChildren();
    $("more").hidden = true;
    say(`No title holds “${text}”, and no customer has that id.`);
  } catch (error) {
    say(error.message, true);
  }
});

document.addEventListener("keydown", (event) => {
  const writes = event.target.closest("input, textarea, select, dialog");
  if (event.key === "/" && !writes) {
    event.preventDefault();
    $("query").focus();
  } else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && event.target.matches("#answer summary")) {
    const lines = [...document.querySelectorAll("#answer summary")];
    const next = lines[lines.indexOf(event.target) + (event.key === "ArrowDown" ? 1 : -1)];
    if (next) {
      event.preventDefault();
      next.focus();
    }
  }
});

// ------------------------------------------------------------------ filters

function chooseAttribute() {
  const one = attributes[$("attribute").value];
  const isNumber = one?.kind === "number";
  $("by-range").hidden = !isNumber;
  $("by-value").hidden = isNumber;
  $("value").value = $("least").value = $("largest").value = "";
  if (isNumber) {
    $("least").placeholder = one.least ?? "";
    $("largest").placeholder = one.largest ?? "";
  } else {
    $("values").replaceChildren(...(one?.values ?? []).map(([value, n]) => element("option", { value, label: count(n, "item") })));
  }
}

function showFilters() {
  $("filters").replaceChildren(...[...filters].map(([name, { text }]) =>
    element("li", {}, button(`${text} ×`, () => { filters.delete(name); showFilters(); }, { "aria-label": `Remove the filter ${text}` }))));
  shown = FIRST;
  if (subject) show(subject);
}

$("attribute").addEventListener("change", chooseAttribute);
$("filter-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("attribute").value;
  if (attributes[name].kind === "number") {
    const condition = {};
    if ($("least").value !== "") condition.gte = Number($("least").value);
    if ($("largest").value !== "") condition.lte = Number($("largest").value);
    if (!Object.keys(condition).length) return $("least").focus();
    filters.set(name, { condition, text: `${name} ${condition.gte ?? "…"} to ${condition.lte ?? "…"}` });
  } else {
    const value = $("value").value.trim();
    if (!value) return $("value").focus();
    filters.set(name, { condition: value, text: `${name}: ${value}` });
  }
  $("filter-box").open = false;
  chooseAttribute();
  showFilters();
});

// ------------------------------------------------------------------ variety

function nameVariety() {
  const text = variety() ? `${variety()} of ${$("variety").max}` : "none";
  $("variety-value").textContent = text;
  $("variety").setAttribute("aria-valuetext", text);
}

let sliding;
$("variety").addEventListener("input", () => {
  nameVariety();
  clearTimeout(sliding);
  sliding = setTimeout(() => {
    shown = FIRST;
    if (subject) show(subject);
  }, SLIDING_PAUSE_MS);
});

// ------------------------------------------------------------------ adding an item

$("new-item").addEventListener("click", () => {
  $("add-status").textContent = "";
  $("add").showModal();
});
$("add-cancel").addEventListener("click", () => $("add").close());
$("add-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const id = $("new-id").value;
  const title = $("new-title").value;
  const text = $("new-text").value.trim();
  $("add-ok").disabled = true;
  try {
    const [file] = $("new-picture").files;
    const problem = file ? problemOf(file) : "";
    if (problem) throw new Error(problem);
    await call(itemPath(id), { method: "PUT", body: { title, text, ...(file && { image: await base64(file) }) } });
    $("add").close();
    $("add-form").reset();
    hideSubject();
    await recommend(`With ${title}, for its text`, { text }, id);
    const at = [...$("answer").children].findIndex((node) => node.dataset.id === id);
    say(at < 0 ? `Added; it is not among the first ${shown} here.` : `Added; it is number ${at + 1}.`);
  } catch (error) {
    $("add-status").textContent = error.message;
  } finally {
    $("add-ok").disabled = false;
  }
});

// ------------------------------------------------------------------ the beginning

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value);
  $("key-form").hidden = true;
  load();
});

function welcome() {
  const picture = takesImages ? " Or give a picture: drop it anywhere." : "";
  say(hasText ? `Write words, a title or a customer's id. Press / to come back here.${picture}` : `Write a title or a customer's id.${picture}`);
}

async function load() {
  try {
    const [model, known] = await Promise.all([call("v1/model"), call("v1/attributes")]);
    const name = model.producer?.dataset ?? "Recommendations";
    $("name").textContent = document.title = name;
    const { items, users, interactions } = model.counts;
    $("counts").textContent = [count(items, "item"), count(users, "customer"), count(interactions, "choice")].join(" · ");
    $("model").textContent = `export ${model.export_id}`;
    hasText = model.encoder_state === "ready" || model.encoder_state === "loading";
    $("new-item").hidden = !hasText;
    hasImages = model.images;
    $("answer").classList.toggle("pictured", hasImages);
    const tookImages = takesImages;
    takesImages = model.image_encoder_state === "ready" || model.image_encoder_state === "loading";
    $("picture-box").hidden = $("or-picture").hidden = !takesImages;
    if (takesImages && !tookImages) takePictures(showPicture);
    attributes = known.attributes;
    $("attribute").replaceChildren(...Object.keys(attributes).map((each) => element("option", { text: each })));
    $("filter-box").hidden = !Object.keys(attributes).length;
    chooseAttribute();
    $("variety-box").hidden = false;
    nameVariety(); // a browser keeps where a slider was when a page is loaded again
    welcome();
  } catch (error) {
    say(error.message, true);
  }
}

load();
