// The search page: words or a file in, hits out. The address holds the query, so that a link repeats a search.

const MODALITIES = ["image", "page", "video", "text"];
const KINDS = { image: "image", video: "video", application: "document" };
const TOP_K = 24;
const MOMENTS = 8; // of a video, in addition to the best one
const $ = (id) => document.getElementById(id);
let file = null; // {kind, uri, name} of the file that is asked with
let like = null; // {split, source, index, start_s, name} of the hit that is asked with
let latest = 0; // number of the last search, because answers may overtake each other

for (const modality of MODALITIES) {
  const label = document.createElement("label");
  const box = document.createElement("input");
  box.type = "checkbox";
  box.value = modality;
  box.addEventListener("change", search);
  label.append(box, ` ${modality}`);
  $("filters").append(label);
}

function boxes() {
  return [...$("filters").querySelectorAll("input")];
}

function headers() {
  const key = sessionStorage.getItem("key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function search() {
  const text = $("query").value.trim();
  const modalities = boxes().filter((box) => box.checked).map((box) => box.value);
  remember(text, modalities);
  if (!text && !file && !like) {
    $("hits").replaceChildren();
    $("status").textContent = "";
    return;
  }
  const number = ++latest;
  const query = file ? { [file.kind]: file.uri, ...(file.kind === "document" ? { page: 0 } : {}) } : {};
  if (text) query.text = text;
  const { name: _, ...target } = like || {};
  const asked = like ? { like: target } : { query };
  $("status").textContent = "Searching";
  const began = performance.now();
  try {
    const body = JSON.stringify({ ...asked, top_k: TOP_K, modalities, group: true });
    const answer = await fetch("/v1/search", { method: "POST", headers: headers(), body });
    const content = await answer.json();
    if (number !== latest) return;
    if (!answer.ok) {
      $("access").hidden = answer.status !== 401 && !sessionStorage.getItem("key");
      $("access").open = answer.status === 401;
      throw new Error(content.error.message);
    }
    $("hits").replaceChildren(...content.data.map((hit, place) => card(hit, content.data[place + 1])));
    const seconds = ((performance.now() - began) / 1000).toFixed(2);
    $("status").textContent = `${content.data.length} hits in ${seconds} s`;
  } catch (error) {
    if (number !== latest) return;
    $("hits").replaceChildren();
    $("status").textContent = error.message;
  }
}

function card(hit, next) {
  const item = document.createElement("li");
  const title = document.createElement("div");
  const facts = document.createElement("div");
  title.className = "title";
  title.textContent = hit.title || hit.origin;
  facts.className = "facts";
  const margin = next ? `, ${(hit.score - next.score).toFixed(3)} before the next` : "";
  facts.textContent = `${hit.rank}. ${hit.modality}, ${hit.score.toFixed(3)}${margin}. ${place(hit)}`;
  if (hit.modality !== "text") picture(item, hit);
  item.append(title, facts, actions(item, hit));
  return item;
}

// Buttons of a hit: play it, look for others like it, and play further moments of the same video.
function actions(item, hit) {
  const bar = document.createElement("div");
  bar.className = "actions";
  if (hit.modality === "video") bar.append(button("Play", () => play(item, hit, hit)));
  bar.append(button("More like this", () => ask(hit)));
  if (hit.moments.length) {
    const also = document.createElement("span");
    also.textContent = "Also at";
    bar.append(also);
  }
  for (const moment of hit.moments.slice(0, MOMENTS)) {
    const one = button(time(moment.start_s), () => play(item, hit, moment));
    one.title = `${range(moment)}, ${moment.score.toFixed(3)}`;
    bar.append(one);
  }
  return bar;
}

function button(label, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = label;
  made.addEventListener("click", act);
  return made;
}

// A time as players write it: 1:30, 1:00:05, 0:02.5.
function time(seconds) {
  const ms = Math.round(seconds * 1000);
  const minutes = Math.floor(ms / 60000);
  const text = minutes < 60 ? `${minutes}` : `${Math.floor(minutes / 60)}:${`${minutes % 60}`.padStart(2, "0")}`;
  const rest = ms % 1000 ? `.${`${ms % 1000}`.padStart(3, "0")}`.replace(/0+$/, "") : "";
  return `${text}:${`${Math.floor((ms % 60000) / 1000)}`.padStart(2, "0")}${rest}`;
}

function range(hit) {
  return `${time(hit.start_s)}-${time(hit.end_s)}`;
}

function place(hit) {
  return hit.end_s == null ? hit.origin : `${hit.origin} ${range(hit)}`;
}

// The address of a hit below a route, for one moment of it.
function address(route, hit, moment) {
  const path = [hit.split, hit.source, hit.index].map(encodeURIComponent).join("/");
  const asked = moment.end_s == null ? "" : `?start_s=${moment.start_s}&end_s=${moment.end_s}`;
  return `${route}/${path}${asked}`;
}

async function picture(item, hit) {
  const answer = await fetch(address("/v1/pictures", hit, hit), { headers: headers() });
  if (!answer.ok || item.querySelector("video")) return;
  const image = document.createElement("img");
  image.alt = hit.title || hit.origin;
  image.src = URL.createObjectURL(await answer.blob());
  image.addEventListener("load", () => URL.revokeObjectURL(image.src));
  item.prepend(image);
}

// Play one moment instead of the picture. The clip begins at a key frame, so that the moment is a fragment of it.
async function play(item, hit, moment) {
  const answer = await fetch(address("/v1/clips", hit, moment), { headers: headers() });
  if (!answer.ok) {
    $("status").textContent = `${place(hit)} cannot be played here.`;
    return;
  }
  const [start, end] = ["x-rzen-start-s", "x-rzen-end-s"].map((name) => answer.headers.get(name));
  const video = document.createElement("video");
  const uri = URL.createObjectURL(await answer.blob());
  video.controls = true;
  video.title = place({ ...hit, ...moment });
  video.addEventListener("error", () => {
    $("status").textContent = `This browser cannot play ${hit.origin}.`;
  });
  video.src = `${uri}#t=${start},${end}`;
  const before = item.querySelector("video");
  if (before) URL.revokeObjectURL(before.src.split("#")[0]);
  (before || item.querySelector("img"))?.remove();
  item.prepend(video);
  video.play().catch(() => {});
}

// Ask with a hit: what is near it in the corpus.
function ask(hit) {
  forget();
  $("query").value = "";
  const { split, source, index, start_s } = hit;
  like = { split, source, index, ...(start_s == null ? {} : { start_s }), name: place(hit) };
  show(document.createTextNode(`Like ${like.name}`));
  scrollTo(0, 0);
  search();
}

function forget() {
  file = like = null;
  $("chosen").hidden = true;
}

function show(node) {
  $("shown").replaceChildren(node);
  $("chosen").hidden = false;
}

function choose(given) {
  const kind = given && KINDS[given.type.split("/")[0]];
  if (!kind || (kind === "document" && given.type !== "application/pdf")) {
    $("status").textContent = "Choose an image, a video or a PDF.";
    return;
  }
  const reader = new FileReader();
  reader.addEventListener("load", () => {
    forget();
    file = { kind, uri: reader.result, name: given.name };
    const shown = kind === "image" ? new Image() : document.createElement("span");
    if (kind === "image") shown.src = reader.result;
    else shown.textContent = given.name;
    show(shown);
    search();
  });
  reader.readAsDataURL(given);
}

function remember(text, modalities) {
  const words = new URLSearchParams();
  if (text) words.set("q", text);
  for (const modality of modalities) words.append("show", modality);
  if (like) words.set("like", JSON.stringify(like));
  history.replaceState(null, "", words.size ? `#${words}` : location.pathname);
}

function recall() {
  const words = new URLSearchParams(location.hash.slice(1));
  $("query").value = words.get("q") || "";
  for (const box of boxes()) box.checked = words.getAll("show").includes(box.value);
  const given = words.get("like");
  if (like) forget();
  if (given) {
    like = JSON.parse(given);
    show(document.createTextNode(`Like ${like.name}`));
  }
  search();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (like) forget(); // words begin another search
  search();
});
$("file").addEventListener("change", () => choose($("file").files[0]));
$("remove").addEventListener("click", () => {
  forget();
  search();
});
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  search();
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) choose(event.clipboardData.files[0]);
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", () => document.body.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  if (event.dataTransfer.files.length) choose(event.dataTransfer.files[0]);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== $("query")) {
    event.preventDefault();
    $("query").focus();
  }
});
addEventListener("hashchange", recall);
recall();
