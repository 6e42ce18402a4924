// Small pictures of items, and a picture that somebody gives.

import { $, KEY, element, itemPath } from "./common.js";

export const MOST_BYTES = 5 << 20;
export const KINDS = ["image/jpeg", "image/png", "image/webp", "image/gif"];

// a key travels in a header, which an address of a picture cannot have: with one, pictures are fetched as they come into sight
const ahead = new IntersectionObserver((seen) => {
  for (const { isIntersecting, target } of seen) {
    if (!isIntersecting) continue;
    ahead.unobserve(target);
    bring(target);
  }
}, { rootMargin: "300px" });

async function bring(image) {
  try {
    const response = await fetch(image.dataset.path, { headers: { "x-api-key": sessionStorage.getItem(KEY) ?? "" } });
    if (!response.ok) throw new Error(response.status);
    const address = URL.createObjectURL(await response.blob());
    image.addEventListener("load", () => URL.revokeObjectURL(address), { once: true });
    image.src = address;
  } catch {
    image.remove();
  }
}

// the box is there and as large with a picture as without: nothing moves when one comes
export function thumb(item) {
  const box = element("span", { className: "thumb" });
  if (!item.image) return box;
  const image = element("img", { alt: `Picture of ${item.title}`, loading: "lazy", decoding: "async" });
  image.addEventListener("error", () => image.remove());
  box.append(image);
  const path = `${itemPath(item.id)}/image`;
  if (sessionStorage.getItem(KEY)) {
    image.dataset.path = path;
    ahead.observe(image);
  } else image.src = path;
  return box;
}

export function problemOf(file) {
  if (!KINDS.includes(file.type)) return "That is no picture that can be read: JPEG, PNG, WEBP or GIF.";
  return file.size > MOST_BYTES ? "The picture is larger than 5 MB." : "";
}

export function shown(file) {
  const image = element("img", { alt: "The picture that you gave" });
  const address = URL.createObjectURL(file);
  image.addEventListener("load", () => URL.revokeObjectURL(address), { once: true });
  image.src = address;
  return element("li", { className: "given" }, image);
}

export function base64(file) {
  return new Promise((done, fail) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => fail(new Error("The picture cannot be read."));
    reader.readAsDataURL(file);
  });
}

// chosen, dropped anywhere, or pasted
export function takePictures(take) {
  $("by-picture").hidden = false;
  $("by-picture").addEventListener("click", () => $("picture").click());
  $("picture").addEventListener("change", () => {
    const [file] = $("picture").files;
    $("picture").value = ""; // the same one can be chosen again
    if (file) take(file);
  });
  const holdsFile = (event) => event.dataTransfer?.types.includes("Files");
  let inside = 0;
  const mark = () => document.body.classList.toggle("dropping", inside > 0);
  document.addEventListener("dragenter", (event) => {
    if (holdsFile(event)) inside++;
    mark();
  });
  document.addEventListener("dragleave", (event) => {
    if (holdsFile(event)) inside--;
    mark();
  });
  document.addEventListener("dragover", (event) => holdsFile(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    inside = 0;
    mark();
    if (!holdsFile(event)) return;
    event.preventDefault(); // or the browser leaves for the file
    const [file] = event.dataTransfer.files;
    if (file && !$("add").open) take(file);
  });
  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData?.files ?? [];
    if (file && !$("add").open) take(file);
  });
}
