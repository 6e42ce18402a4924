// What the parts of the page share: elements, words, and calls of the service at its own origin.

export const KEY = "recbole-llm-key";
const MOST_TRIES = 60;

export const $ = (id) => document.getElementById(id);

export function element(tag, { text, className, ...rest } = {}, ...children) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  for (const [name, value] of Object.entries(rest)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export function button(text, act, rest = {}) {
  const node = element("button", { text, type: "button", ...rest });
  node.addEventListener("click", act);
  return node;
}

export function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

export async function call(path, { method = "GET", body } = {}) {
  const headers = {};
  const isFile = body instanceof Blob;
  if (body !== undefined) headers["content-type"] = isFile ? body.type : "application/json";
  const key = sessionStorage.getItem(KEY);
  if (key) headers["x-api-key"] = key;
  let response;
  try {
    response = await fetch(path, { method, headers, body: isFile || body === undefined ? body : JSON.stringify(body) });
  } catch {
    throw new Error("The service does not answer. Try again in a moment.");
  }
  const content = await response.json().catch(() => ({}));
  if (response.status === 401) {
    $("key-form").hidden = false;
    $("key").focus();
  }
  if (!response.ok) {
    const error = new Error(content.detail ?? `The service answered ${response.status}.`);
    error.wait = response.status === 503 ? Number(response.headers.get("retry-after")) : 0;
    throw error;
  }
  return content;
}

// asks again while the service says that waiting helps, as it does while it loads what reads texts
export async function patiently(ask, isWanted) {
  for (let left = MOST_TRIES; ; left--) {
    try {
      return await ask();
    } catch (error) {
      if (!error.wait || !left || !isWanted()) throw error;
      say(`${error.message} The answer comes as soon as it can.`);
      await new Promise((resume) => setTimeout(resume, 1000 * Math.min(error.wait, 5)));
    }
  }
}

export const itemPath = (id) => `v1/items/${encodeURIComponent(id)}`;
export const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
export const percent = (p) => (p >= 0.1 ? `${Math.round(100 * p)}%` : p >= 0.001 ? `${(100 * p).toPrecision(2)}%` : "<.1%");
