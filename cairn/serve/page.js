"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#ffffff"];
const KEY = "token";

let health = null;
let answer = null; // what was last said of the picture
let picture = null; // the picture it was said of
let asked = 0; // only the answer to the last question is shown
let why = 0; // whose patches are shown
let chosen = []; // pictures to teach with
let busy = false;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children); // text comes as text, whatever signs it has
  return made;
}

function drawn(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function percent(p) {
  if (p > 0 && p < 0.005) return "under 1\u00a0%";
  if (p < 1 && p >= 0.995) return "over 99\u00a0%";
  return `${Math.round(100 * p)}\u00a0%`;
}

const megabytes = (bytes) => `${+(bytes / 1e6).toFixed(1)} MB`;
const counted = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;

function tell(id, text) {
  $(id).textContent = text;
  $(id).hidden = !text;
}

// --- asking the service ---------------------------------------------------------------------------------------------

async function api(path, options = {}, withToken = true) {
  const token = sessionStorage.getItem(KEY);
  const headers = token && withToken ? { Authorization: `Bearer ${token}` } : {};
  let response;
  try {
    response = await fetch(`api/${path}`, { ...options, headers });
  } catch {
    throw new Error("The service does not answer. Is it still running?");
  }
  const body = await response.json().catch(() => ({}));
  if (!response.ok) {
    const text = body.error || `the service answered ${response.status}`;
    throw new Error(text[0].toUpperCase() + text.slice(1) + ".");
  }
  return body;
}

function tooLarge(file) {
  if (!health || file.size <= health.max_bytes) return "";
  return `“${file.name}” is too large: it has ${megabytes(file.size)}, ${megabytes(health.max_bytes)} is the most.`;
}

async function begin() {
  try {
    health = await api("health");
    $("access").hidden = health.may_change;
    $("access-why").textContent = health.may_ask
      ? "To teach or to forget, give the code that was shown when the service was started."
      : "Give the code of this service to use it.";
    $("teach").hidden = !health.may_change;
    $("look").hidden = !health.may_ask;
    $("sentences-field").hidden = !health.describes;
    if (health.may_ask) know((await api("classes")).classes);
    else $("summary").textContent = "This service asks for an access code.";
  } catch (error) {
    $("summary").textContent = error.message;
  }
}

// --- looking --------------------------------------------------------------------------------------------------------

async function look(file) {
  const question = ++asked;
  tell("look-problem", tooLarge(file));
  if (!$("look-problem").hidden) return;
  if (file !== picture) {
    picture = file;
    answer = null;
    if ($("picture").src) URL.revokeObjectURL($("picture").src);
    $("picture").src = URL.createObjectURL(file);
    $("bars").replaceChildren();
    draw();
  }
  $("result").hidden = false;
  $("result").classList.add("waiting");
  $("verdict").className = "";
  $("verdict").textContent = "Looking …";
  const form = new FormData();
  form.append("image", file);
  try {
    const found = await api("predict", { method: "POST", body: form });
    if (question !== asked) return;
    [answer, why] = [found, 0];
    say();
  } catch (error) {
    if (question !== asked) return;
    $("result").hidden = true;
    tell("look-problem", error.message);
  } finally {
    if (question === asked) $("result").classList.remove("waiting");
  }
}

function say() {
  if (!answer) return;
  const [best] = answer.classes;
  const unsure = answer.known < Number($("threshold").value);
  const verdict = unsure
    ? `Not sure: this may be none of the known classes. The closest is ${best.name}.`
    : `${best.name}, ${percent(best.probability)}`;
  $("verdict").className = unsure ? "unsure" : "";
  if ($("verdict").textContent !== verdict) $("verdict").textContent = verdict;
  $("fit").textContent = percent(answer.known);
  $("bars").replaceChildren(...answer.classes.map(bar));
  draw();
}

function bar({ name, probability }) {
  const reason = answer.reasons.findIndex((other) => other.name === name);
  const fill = element("span", { class: "fill" });
  fill.style.width = `${100 * probability}%`;
  const row = element(
    reason < 0 ? "div" : "button", { class: "bar" },
    element("span", { class: "name", dir: "auto" }, name),
    element("span", { class: "percent" }, percent(probability)),
    element("span", { class: "track", "aria-hidden": "true" }, fill),
  );
  if (reason >= 0) {
    row.type = "button";
    row.title = "Show what speaks for it";
    row.setAttribute("aria-pressed", String(reason === why));
    row.addEventListener("click", () => {
      why = reason;
      for (const other of $("bars").querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === row));
      draw();
    });
  }
  return element("li", {}, row);
}

function draw() {
  const reason = answer?.reasons[why];
  const overlay = $("overlay");
  overlay.replaceChildren();
  $("phrases").hidden = $("overlay-choice").hidden = !reason;
  if (!reason) return;
  const shares = new Map();
  for (const { sentence, share } of reason.patches) shares.set(sentence, (shares.get(sentence) || 0) + share);
  const order = [...shares.keys()].sort((a, b) => shares.get(b) - shares.get(a));
  const colour = (sentence) => COLOURS[Math.min(order.indexOf(sentence), COLOURS.length - 1)];

  if ($("show-patches").checked) {
    const n = answer.grid;
    overlay.setAttribute("viewBox", `0 0 ${n} ${n}`);
    // Of a cropped picture the centre square was seen: exactly where "meet" puts the square of the drawing
    overlay.setAttribute("preserveAspectRatio", { squash: "none", pad: "xMidYMid slice" }[answer.view] ?? "xMidYMid meet");
    let dim = `M${-20 * n} ${-20 * n}h${41 * n}v${41 * n}h${-41 * n}z`;
    const frames = [];
    for (const { patch, sentence } of reason.patches) {
      const [x, y] = [patch % n, Math.floor(patch / n)];
      dim += `M${x} ${y}v1h1v-1z`;
      frames.push(drawn("rect", { x: x + 0.05, y: y + 0.05, width: 0.9, height: 0.9, stroke: colour(sentence) }));
    }
    overlay.append(drawn("path", { d: dim, class: "dim", "fill-rule": "evenodd" }), ...frames);
  }

  $("phrases-title").textContent = `What speaks for ${reason.name}`;
  $("phrase-list").replaceChildren(...order.map((sentence) => {
    const swatch = drawn("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" });
    swatch.append(drawn("rect", { x: 0.5, y: 0.5, width: 9, height: 9, rx: 2, fill: colour(sentence) }));
    const share = element("span", { class: "percent" }, percent(shares.get(sentence)));
    return element("li", {}, swatch, share, element("span", { dir: "auto" }, sentence));
  }));
}

// --- teaching -------------------------------------------------------------------------------------------------------

function choose(files) {
  tell("teach-problem", "");
  $("teach-status").textContent = "";
  for (const file of files) {
    const problem = tooLarge(file);
    if (problem) tell("teach-problem", problem);
    else chosen.push(file);
  }
  if (chosen.length > health.max_images) {
    chosen.length = health.max_images;
    tell("teach-problem", `At most ${health.max_images} pictures at once.`);
  }
  showChosen();
}

function showChosen() {
  for (const image of $("chosen").querySelectorAll("img")) URL.revokeObjectURL(image.src);
  $("chosen").replaceChildren(...chosen.map((file, i) => {
    const image = element("img", { alt: file.name, src: URL.createObjectURL(file) });
    const remove = element("button", { type: "button", "aria-label": `Leave out ${file.name}` }, "×");
    remove.addEventListener("click", () => {
      chosen.splice(i, 1);
      showChosen();
      ($("chosen").querySelectorAll("button")[Math.min(i, chosen.length - 1)] || $("files")).focus();
    });
    return element("li", {}, image, remove);
  }));
}

async function teach() {
  const name = $("name").value.trim();
  tell("teach-problem", "");
  if (!name || !chosen.length) {
    tell("teach-problem", name ? "Choose some pictures of it first." : "Give it a name first.");
    return;
  }
  const form = new FormData();
  form.append("name", name);
  for (const file of chosen) form.append("images", file);
  if (health.describes && $("sentences").value.trim()) form.append("sentences", $("sentences").value);
  await changing(`Learning “${name}” from ${counted(chosen.length, "picture")} …`, "teach-problem", async () => {
    know((await api("learn", { method: "POST", body: form })).classes);
    chosen = [];
    showChosen();
    $("name").value = $("sentences").value = "";
    return `Learned “${name}”.`;
  });
}

async function changing(text, problem, change) {
  if (busy) return;
  busy = true;
  tell(problem, "");
  $("teach-status").textContent = text;
  $("progress").removeAttribute("value");
  $("progress").hidden = false;
  enable();
  const polling = setInterval(async () => {
    const share = await api("health", {}, false).then((now) => now.learning, () => null);
    if (busy && share) $("progress").value = share;
  }, 1000);
  try {
    $("teach-status").textContent = await change();
    if (picture && !$("result").hidden) look(picture);
  } catch (error) {
    $("teach-status").textContent = "";
    tell(problem, error.message);
  } finally {
    clearInterval(polling);
    busy = false;
    $("progress").hidden = true;
    enable();
  }
}

function enable() {
  for (const button of [$("learn"), ...$("known").querySelectorAll("button")]) button.disabled = busy;
}

// --- what is known --------------------------------------------------------------------------------------------------

function know(classes) {
  $("summary").textContent = `It knows ${counted(classes.length, "class", "classes")} and keeps no picture.`;
  $("names").replaceChildren(...classes.map(({ name }) => element("option", { value: name })));
  $("known").replaceChildren(...classes.map(({ name, images }) => {
    const row = element(
      "li", {}, element("span", { class: "name", dir: "auto" }, name), element("span", { class: "soft" }, counted(images, "picture")),
    );
    if (health.may_change && classes.length > 1) {
      const button = element("button", { type: "button", "aria-label": `Forget ${name}` }, "Forget");
      button.addEventListener("click", () => ask(name));
      row.append(button);
    }
    return row;
  }));
  enable();
}

function ask(name) {
  $("ask-title").textContent = `Forget “${name}”?`;
  $("ask").returnValue = "keep";
  $("ask").onclose = () => {
    if ($("ask").returnValue !== "forget") return;
    changing(`Forgetting “${name}” …`, "known-problem", async () => {
      know((await api(`classes/${encodeURIComponent(name)}`, { method: "DELETE" })).classes);
      $("known-title").focus();
      return `Forgot “${name}”.`;
    });
  };
  $("ask").showModal();
}

// --- the page -------------------------------------------------------------------------------------------------------

function takes(area, input, given) {
  $(input).addEventListener("change", () => {
    const files = [...$(input).files];
    $(input).value = ""; // the same file may be chosen again
    if (files.length) given(files);
  });
  for (const kind of ["dragenter", "dragover"]) $(area).addEventListener(kind, () => $(area).classList.add("over"));
  for (const kind of ["dragleave", "drop"]) $(area).addEventListener(kind, () => $(area).classList.remove("over"));
  $(area).addEventListener("drop", (event) => {
    if (event.dataTransfer.files.length) given([...event.dataTransfer.files]);
  });
}

// A file that misses its place must not take the place of the page
for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault());

takes("drop", "file", ([file]) => look(file));
takes("teach-drop", "files", choose);

document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file && !$("look").hidden) look(file);
});

$("picture").addEventListener("error", () => { $("view").hidden = true; $("no-preview").hidden = false; });
$("picture").addEventListener("load", () => {
  $("view").style.setProperty("--ratio", $("picture").naturalWidth / $("picture").naturalHeight);
  $("view").hidden = false;
  $("no-preview").hidden = true;
});
$("show-patches").addEventListener("change", draw);
$("known-title").tabIndex = -1;

function threshold() {
  $("threshold-value").textContent = percent(Number($("threshold").value));
}
$("threshold").addEventListener("input", () => { threshold(); say(); });
threshold();

$("teach-form").addEventListener("submit", (event) => { event.preventDefault(); teach(); });
$("access-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  tell("access-problem", "");
  sessionStorage.setItem(KEY, $("code").value.trim());
  $("code").value = "";
  await begin();
  if (health && !health.may_change) {
    sessionStorage.removeItem(KEY);
    tell("access-problem", "That is not the code.");
  }
});

// The code comes behind the #, which browsers send to nobody, and leaves the address at once
function takeCode() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!given) return;
  sessionStorage.setItem(KEY, given);
  history.replaceState(null, "", location.pathname);
}
window.addEventListener("hashchange", () => { takeCode(); begin(); });
takeCode();
begin();
