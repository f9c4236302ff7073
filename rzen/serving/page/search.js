// The search page: words or a file in, hits out. The address holds the query, so that a link repeats a search.

const MODALITIES = ["image", "page", "video", "text"];
const KINDS = { image: "image", video: "video", application: "document" };
const TOP_K = 24;
const $ = (id) => document.getElementById(id);
let file = null; // {kind, uri, name} of the file that is asked with
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
  if (!text && !file) {
    $("hits").replaceChildren();
    $("status").textContent = "";
    return;
  }
  const number = ++latest;
  const query = file ? { [file.kind]: file.uri, ...(file.kind === "document" ? { page: 0 } : {}) } : {};
  if (text) query.text = text;
  $("status").textContent = "Searching";
  const began = performance.now();
  try {
    const body = JSON.stringify({ query, top_k: TOP_K, modalities });
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
  facts.textContent = `${hit.rank}. ${hit.modality}, ${hit.score.toFixed(3)}${margin}. ${hit.origin}`;
  if (hit.modality !== "text") picture(item, hit);
  item.append(title, facts);
  return item;
}

async function picture(item, hit) {
  const path = [hit.split, hit.source, hit.index].map(encodeURIComponent).join("/");
  const answer = await fetch(`/v1/pictures/${path}`, { headers: headers() });
  if (!answer.ok) return;
  const image = document.createElement("img");
  image.alt = hit.title || hit.origin;
  image.src = URL.createObjectURL(await answer.blob());
  image.addEventListener("load", () => URL.revokeObjectURL(image.src));
  item.prepend(image);
}

function choose(given) {
  const kind = given && KINDS[given.type.split("/")[0]];
  if (!kind || (kind === "document" && given.type !== "application/pdf")) {
    $("status").textContent = "Choose an image, a video or a PDF.";
    return;
  }
  const reader = new FileReader();
  reader.addEventListener("load", () => {
    file = { kind, uri: reader.result, name: given.name };
    const shown = kind === "image" ? new Image() : document.createElement("span");
    if (kind === "image") shown.src = reader.result;
    else shown.textContent = given.name;
    $("shown").replaceChildren(shown);
    $("chosen").hidden = false;
    search();
  });
  reader.readAsDataURL(given);
}

function remember(text, modalities) {
  const words = new URLSearchParams();
  if (text) words.set("q", text);
  for (const modality of modalities) words.append("show", modality);
  history.replaceState(null, "", words.size ? `#${words}` : location.pathname);
}

function recall() {
  const words = new URLSearchParams(location.hash.slice(1));
  $("query").value = words.get("q") || "";
  for (const box of boxes()) box.checked = words.getAll("show").includes(box.value);
  search();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});
$("file").addEventListener("change", () => choose($("file").files[0]));
$("remove").addEventListener("click", () => {
  file = null;
  $("chosen").hidden = true;
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
