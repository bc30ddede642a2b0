// The search page: asks POST /search, shows what comes back. Whatever comes from data is set as text, never as markup.
"use strict";

const PAGE = 24;
const MAX_UPLOAD_PX = 512;
const USUAL = { modality: "image" };
const byId = (id) => document.getElementById(id);
const form = byId("form"), text = byId("text"), results = byId("results"), status = byId("status"), more = byId("more");
const filters = byId("filters");

let question = null; // {text} | {image, shown} | {key, words}
let shown = 0;
let asking = 0; // the number of the question whose answer is awaited: a late answer to an older one is dropped

async function post(path, body) {
  const answer = await fetch(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
  if (answer.status === 401) { await login(); return post(path, body); }
  if (!answer.ok) throw new Error(await reason(answer));
  return answer.json();
}

async function reason(answer) {
  if (answer.status === 429) return "Too many searches at once: wait a moment and try again.";
  try {
    const { detail } = await answer.json();
    return typeof detail === "string" ? detail : detail.map((each) => `${each.loc.at(-1)}: ${each.msg}`).join("; ");
  } catch { return `The service answered ${answer.status}.`; }
}

function login() {
  const dialog = byId("login");
  byId("login-error").textContent = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve, reject) => {
    dialog.onclose = () => reject(new Error("Nothing was searched: this service asks for its token. Search again to give it."));
    byId("login-form").onsubmit = async (event) => {
      event.preventDefault();
      const answer = await fetch("/session", {
        method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ token: byId("token").value }),
      });
      if (answer.ok) { dialog.onclose = null; dialog.close(); fillFilters(); resolve(); } else { byId("login-error").textContent = await reason(answer); }
    };
  });
}

// The filters that are set, by name, as text: what the address holds of them.
function filtered() {
  const found = {};
  for (const field of filters.querySelectorAll("select, input")) {
    if (field.type === "checkbox") { if (!field.checked) found[field.name] = "no"; } else if (field.value && field.value !== USUAL[field.name] && field.checkValidity()) found[field.name] = field.value;
  }
  return found;
}

function setFilters(given) {
  for (const field of filters.querySelectorAll("select, input")) {
    const value = given.get(field.name) ?? USUAL[field.name] ?? "";
    if (field.type === "checkbox") { field.checked = value !== "no"; continue; }
    if (field.tagName === "SELECT" && value && ![...field.options].some((option) => option.value === value)) field.append(new Option(value, value));
    field.value = value;
  }
  byId("filter-count").textContent = count();
}

function count() { const set = Object.keys(filtered()).length; return set ? `(${set})` : ""; }

function chosen() {
  const { modality = "image", near_copies: nearCopies = "yes", min_side_px: side = "0", ...lists } = filtered();
  byId("filter-count").textContent = count();
  return {
    modality, near_copies: nearCopies !== "no", min_side_px: Number(side),
    ...Object.fromEntries(Object.entries(lists).map(([name, value]) => [name, [value]])),
  };
}

function address(next) {
  const given = new URLSearchParams(filtered());
  if (next && "text" in next) given.set("text", next.text); else if (next && "key" in next) given.set("key", next.key);
  return `#${String(given).replaceAll("+", "%20")}`;
}

async function ask(from) {
  if (!question) return;
  const number = ++asking;
  say(from ? "Loading more…" : "Searching…");
  const { shown: _shown, words: _words, ...asked } = question;
  let answer;
  try {
    answer = await post("/search", { ...asked, ...chosen(), k: PAGE, offset: from });
  } catch (error) {
    if (number === asking) say(error.message, true);
    return;
  }
  if (number !== asking) return;
  if (!from) { results.replaceChildren(); shown = 0; }
  const known = new Set([...results.children].map((item) => item.dataset.key));
  const first = answer.results.filter((result) => !known.has(result.key)).map(card).map((item) => results.appendChild(item))[0];
  shown += answer.results.length;
  more.hidden = answer.results.length < PAGE;
  byId("hint").hidden = shown > 0;
  say(shown ? `${shown.toLocaleString()} of ${answer.samples.toLocaleString()} pictures, nearest first` : "Nothing matches these filters.");
  if (from && first) first.querySelector("button").focus();
  if (!from) window.scrollTo(0, 0);
}

function card(result) {
  const item = element("li", "card");
  item.dataset.key = result.key;
  const like = element("button", "like");
  like.type = "button";
  like.title = "More like this";
  like.setAttribute("aria-label", `More like “${result.caption}”, score ${result.score.toFixed(3)}`);
  like.onclick = () => moreLike(result);
  const picture = element("img");
  picture.alt = "";
  picture.loading = "lazy";
  picture.width = picture.height = 144;
  picture.onerror = () => item.classList.add("lost");
  if (result.width_px <= 96) item.classList.add("small");
  picture.src = `/thumbnail/${encodeURIComponent(result.key)}`;
  like.append(picture);
  const words = element("div", "words");
  words.append(element("p", "caption", result.caption || "no caption"), score(result.score));
  const facts = element("p", "facts");
  facts.append(element("span", "", [result.style, result.licence].filter(Boolean).join(" · ")));
  if (/^https?:\/\//i.test(result.url)) {
    const link = element("a", "", "source");
    link.href = result.url;
    link.rel = "noopener noreferrer nofollow";
    link.target = "_blank";
    facts.append(link);
  }
  words.append(facts);
  item.append(like, words);
  return item;
}

function score(value) {
  const line = element("div", "score", value.toFixed(3));
  const bar = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  bar.setAttribute("viewBox", "0 0 100 5");
  bar.setAttribute("preserveAspectRatio", "none");
  bar.setAttribute("aria-hidden", "true");
  const filled = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  filled.setAttribute("width", String(Math.max(0, Math.min(1, value)) * 100));
  filled.setAttribute("height", "5");
  bar.append(filled);
  line.prepend(bar);
  return line;
}

function element(name, kind = "", words = "") {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  if (words) made.textContent = words;
  return made;
}

function say(words, isWrong = false) {
  status.textContent = words;
  status.classList.toggle("wrong", isWrong);
}

function start(next, isNew = true) {
  question = next;
  const isPicture = Boolean(next && !("text" in next));
  byId("asked").hidden = !isPicture;
  if (isPicture) {
    byId("asked-picture").hidden = !next.shown;
    if (next.shown) byId("asked-picture").src = next.shown;
    byId("asked-words").textContent = next.words;
  } else { text.value = next ? next.text : ""; }
  if (isNew) {
    history.pushState(next && "image" in next ? null : next, "", address(next)); // a picture of one's own stays out of the history
  }
  if (next) ask(0); else { results.replaceChildren(); more.hidden = true; say(""); byId("hint").hidden = false; }
}

function moreLike(result) {
  text.value = "";
  start({ key: result.key, words: `More like “${result.caption}”`, shown: `/thumbnail/${encodeURIComponent(result.key)}` });
}

// Pictures are made smaller here: the encoder looks at few pixels, and the upload stays small.
async function searchPicture(file) {
  try {
    const bitmap = await createImageBitmap(file);
    const scale = Math.min(1, MAX_UPLOAD_PX / Math.max(bitmap.width, bitmap.height));
    const canvas = element("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    const shownAs = canvas.toDataURL("image/png");
    text.value = "";
    start({ image: shownAs, shown: shownAs, words: `Pictures like ${file.name || "the one you gave"}` });
  } catch { say("That file is no picture that can be read: give a PNG, JPEG or WebP file.", true); }
}

async function fillFilters() {
  const answer = await fetch("/facets");
  if (!answer.ok) return; // the first search asks for the token
  const facets = await answer.json();
  for (const select of filters.querySelectorAll("select:not([name=modality])")) {
    const before = select.value;
    const values = Object.entries(facets[select.name] || {});
    select.replaceChildren(new Option("any", ""), ...values.map(([value, many]) => new Option(`${value} (${many.toLocaleString()})`, value)));
    if (before && !(before in (facets[select.name] || {}))) select.append(new Option(before, before));
    select.value = before;
    select.closest("label").hidden = values.length < 2 && !before;
  }
}

function walk(event) {
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: "down", ArrowUp: "up" };
  if (!(event.key in steps) || !document.activeElement.classList.contains("like")) return;
  const all = [...results.querySelectorAll(".like")];
  const columns = getComputedStyle(results).gridTemplateColumns.split(" ").length;
  const step = { down: columns, up: -columns }[steps[event.key]] ?? steps[event.key];
  const next = all[all.indexOf(document.activeElement) + step];
  if (next) { event.preventDefault(); next.focus(); next.scrollIntoView({ block: "nearest" }); }
}

function fromAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  setFilters(given);
  if (given.get("text")) start({ text: given.get("text") }, false);
  else if (given.get("key")) start({ key: given.get("key"), words: "More like this one", shown: `/thumbnail/${encodeURIComponent(given.get("key"))}` }, false);
  else if (question) start(null, false); // at first there is nothing to clear, and somebody may be typing already
}

form.onsubmit = (event) => { event.preventDefault(); start(text.value.trim() ? { text: text.value.trim() } : null); };
byId("pick").onclick = () => byId("file").click();
byId("file").onchange = (event) => { if (event.target.files[0]) searchPicture(event.target.files[0]); event.target.value = ""; };
byId("clear").onclick = () => { start(null); text.focus(); };
more.onclick = () => ask(shown);
filters.onchange = () => { history.pushState(history.state, "", address(question)); byId("filter-count").textContent = count(); ask(0); };
window.onpopstate = (event) => {
  if (!event.state) { fromAddress(); return; }
  setFilters(new URLSearchParams(location.hash.slice(1)));
  start(event.state, false);
};
document.onkeydown = (event) => {
  if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) { event.preventDefault(); text.select(); text.focus(); } else { walk(event); }
};
document.onpaste = (event) => { const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/")); if (file) searchPicture(file); };
let depth = 0;
document.ondragenter = (event) => { event.preventDefault(); depth += 1; byId("drop").hidden = false; };
document.ondragleave = () => { depth -= 1; if (depth <= 0) byId("drop").hidden = true; };
document.ondragover = (event) => event.preventDefault();
document.ondrop = (event) => {
  event.preventDefault();
  depth = 0;
  byId("drop").hidden = true;
  const file = event.dataTransfer.files[0];
  if (file) searchPicture(file);
};

// What takes the focus must not hide below the header while that stays on top.
new ResizeObserver(([{ target }]) => {
  const isOnTop = getComputedStyle(target).position === "sticky";
  document.documentElement.style.scrollPaddingTop = isOnTop ? `${target.offsetHeight + 8}px` : "";
}).observe(document.querySelector("header"));

fromAddress();
fillFilters();
