"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#ffffff"];
const KEY = "token";

let health = null;
let looked = []; // the pictures looked at: {file, url, answer, problem}
let current = 0; // which of them is shown in full
let answer = null; // what was said of that one
let round = 0; // only answers of the last round of questions count
let camera = null; // its stream, while it is on
let snapped = 0;
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
const counted = (n, one, many = `${one}s`) => `${n} ${String(n) === "1" ? one : many}`;

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
    $("sure").hidden = health.several;
    $("right-label").textContent = health.several ? "It shows (several names between semicolons)" : "It is";
    $("name-label").textContent = health.several ? "What do they show? Several names between semicolons" : "What is it called?";
    $("mend").hidden = $("snap-teach").hidden = !health.may_change;
    $("mend-hint").textContent = health.several
      ? health.relabels
        ? "It is learned as showing these and nothing else that was taught."
        : "It is learned as showing these. What it was learned as before stays."
      : health.relabels
      ? "It is learned as that; if it was learned as another class, it is taken out there."
      : "It is learned as that. What it was learned as before stays.";
    $("camera-on").hidden = !health.may_ask || !navigator.mediaDevices?.getUserMedia || Boolean(camera);
    if (health.may_ask) await know((await api("classes")).classes);
    else $("summary").textContent = "This service asks for an access code.";
  } catch (error) {
    $("summary").textContent = error.message;
  }
}

// --- looking --------------------------------------------------------------------------------------------------------

function look(files) {
  for (const { url } of looked) URL.revokeObjectURL(url);
  looked = files.map((file) => ({ file, url: URL.createObjectURL(file), answer: null, problem: "" }));
  $("batch").hidden = looked.length < 2;
  $("rows").replaceChildren(...(looked.length < 2 ? [] : looked.map(row)));
  current = -1;
  show(0);
  return lookAgain();
}

// Ask of all of them, two at a time: each is a request of its own, whatever their number
async function lookAgain() {
  const own = ++round;
  for (const one of looked) [one.answer, one.problem] = [null, tooLarge(one.file)];
  const waiting = looked.filter((one) => !one.problem);
  looked.forEach(tellRow);
  say();
  const asking = async () => {
    for (let one = waiting.shift(); one && own === round; one = waiting.shift()) {
      const form = new FormData();
      form.append("image", one.file);
      const [found, problem] = await api("predict", { method: "POST", body: form }).then((had) => [had, ""], (e) => [null, e.message]);
      if (own !== round) return;
      [one.answer, one.problem] = [found, problem];
      tellRow(one, looked.indexOf(one));
      if (one === looked[current]) {
        why = 0;
        say();
      }
    }
  };
  await Promise.all([asking(), asking()]);
}

function row(one, i) {
  const image = element("img", { alt: "", src: one.url, loading: "lazy" });
  const made = element(
    "button", { type: "button", class: "one" }, image,
    element("span", { class: "name", dir: "auto" }), element("span", { class: "percent" }), element("span", { class: "file", dir: "auto" }, one.file.name),
  );
  made.addEventListener("click", () => show(i));
  return element("li", {}, made);
}

// What is said of a picture in a line: a class, or why there is none
function inShort({ answer: found, problem }) {
  if (problem) return { text: problem, kind: "unread" };
  if (!found) return { text: "…", kind: "" };
  if (found.labels) return { text: found.labels.map(({ name }) => name).join(", ") || "No known class", kind: found.labels.length ? "" : "unsure" };
  const unsure = found.known < Number($("threshold").value);
  return { text: unsure ? `Not sure, ${found.classes[0].name}?` : found.classes[0].name, kind: unsure ? "unsure" : "" };
}

function tellRow(one, i) {
  const made = $("rows").children[i];
  if (!made) return;
  const { text, kind } = inShort(one);
  made.querySelector(".name").textContent = text;
  made.querySelector(".name").className = `name ${kind}`;
  made.querySelector(".percent").textContent = one.answer && !one.answer.labels ? percent(one.answer.classes[0].probability) : "";
  const done = looked.filter((other) => other.answer || other.problem).length;
  $("batch-status").textContent = done < looked.length
    ? `${done} of ${counted(looked.length, "picture")}`
    : counted(looked.length, "picture");
  $("csv").disabled = done < looked.length;
}

// The picture number i in full
function show(i) {
  if (i === current || !looked[i]) return;
  [current, why] = [i, 0];
  [...$("rows").children].forEach((made, j) => made.firstChild.setAttribute("aria-current", String(i === j)));
  $("picture").src = looked[i].url;
  $("picture").alt = looked[i].file.name;
  $("mend").open = false;
  $("mend-status").textContent = "";
  tell("mend-problem", "");
  say();
}

function say() {
  const one = looked[current];
  answer = one?.answer ?? null;
  tell("look-problem", one?.problem ?? "");
  $("result").hidden = !one || Boolean(one.problem);
  $("result").classList.toggle("waiting", !answer);
  $("chips").hidden = !answer?.labels?.length;
  if (!answer) {
    $("verdict").className = "";
    $("verdict").textContent = "Looking …";
    $("bars").replaceChildren();
    draw();
    return;
  }
  const [best] = answer.classes;
  if (answer.labels) {
    const verdict = answer.labels.length ? "It shows" : `It shows no known class. The closest is ${best.name}.`;
    $("verdict").className = answer.labels.length ? "" : "unsure";
    if ($("verdict").textContent !== verdict) $("verdict").textContent = verdict;
    $("chips").replaceChildren(...answer.labels.map(chip));
    $("bars").replaceChildren(...answer.classes.map(bar));
    draw();
    return;
  }
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

function chip({ name, probability }) {
  return element("li", { class: "chip" }, element("span", { class: "name", dir: "auto" }, name), element("span", { class: "percent" }, percent(probability)));
}

// A cell, as a spreadsheet shows it: what it would take for a formula gets an apostrophe in front
function cell(text) {
  const plain = /^[=+@\t\r-]/.test(text) ? `'${text}` : text;
  return /[",\r\n]/.test(plain) ? `"${plain.replaceAll('"', '""')}"` : plain;
}

function table() {
  const least = Number($("threshold").value);
  if (health.several) {
    const lines = looked.flatMap(({ file, answer: found, problem }) => {
      if (!found?.labels?.length) return [[file.name, "", "", problem]];
      return found.labels.map(({ name, probability }) => [file.name, name, probability.toFixed(6), ""]);
    });
    return [["image", "label", "probability", "problem"], ...lines].map((line) => `${line.map(cell).join(",")}\n`).join("");
  }
  const head = ["image", "known", "unknown", "class", "probability", "second", "problem"];
  const lines = looked.map(({ file, answer: found, problem }) => {
    if (!found) return [file.name, "", "", "", "", "", problem];
    const [best, second] = found.classes;
    return [
      file.name, found.known.toFixed(6), String(found.known < least), best.name, best.probability.toFixed(6), second?.name ?? "", "",
    ];
  });
  return [head, ...lines].map((line) => `${line.map(cell).join(",")}\n`).join("");
}

function download() {
  const url = URL.createObjectURL(new Blob([table()], { type: "text/csv" }));
  const link = element("a", { href: url, download: "pictures.csv" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

// --- the camera -----------------------------------------------------------------------------------------------------

async function openCamera() {
  tell("look-problem", "");
  try {
    camera = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" }, audio: false });
  } catch (error) {
    const refused = error.name === "NotAllowedError";
    tell("look-problem", refused ? "The browser may not use the camera; allow it for this page." : "There is no camera that can be used.");
    return;
  }
  $("live").srcObject = camera;
  $("camera").hidden = false;
  $("camera-on").hidden = true;
  $("snap").focus();
}

function closeCamera() {
  for (const track of camera?.getTracks() ?? []) track.stop();
  camera = $("live").srcObject = null;
  $("camera").hidden = true;
  $("camera-on").hidden = false;
  $("camera-on").focus();
}

// The picture that the camera shows, as a file
async function snap() {
  const live = $("live");
  if (!live.videoWidth) return null;
  const canvas = element("canvas", { width: live.videoWidth, height: live.videoHeight });
  canvas.getContext("2d").drawImage(live, 0, 0);
  const blob = await new Promise((done) => { canvas.toBlob(done, "image/jpeg", 0.92); });
  return new File([blob], `camera ${++snapped}.jpg`, { type: "image/jpeg" });
}

// --- correcting -----------------------------------------------------------------------------------------------------

async function correct() {
  const [name, one] = [$("right").value.trim(), looked[current]];
  if (!name || !one) return;
  const form = new FormData();
  form.append("name", name);
  form.append("images", one.file);
  await changing(`Learning it as “${name}” …`, "mend-problem", async () => {
    await know((await api(health.relabels ? "relabel" : "learn", { method: "POST", body: form })).classes);
    $("right").value = "";
    return `Learned as “${name}”.`;
  }, "mend-status");
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

function swatch(fill) {
  const made = drawn("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" });
  made.append(drawn("rect", { x: 0.5, y: 0.5, width: 9, height: 9, rx: 2, fill }));
  return made;
}

// Of a cropped picture the centre square was seen: exactly where "meet" puts the square of the drawing
function place(overlay, n) {
  overlay.setAttribute("viewBox", `0 0 ${n} ${n}`);
  overlay.setAttribute("preserveAspectRatio", { squash: "none", pad: "xMidYMid slice" }[answer.view] ?? "xMidYMid meet");
}

function drawObjects({ mask, regions }) {
  if ($("show-patches").checked) {
    place($("overlay"), 1);
    const image = drawn("image", { href: mask, width: 1, height: 1, preserveAspectRatio: "none" });
    $("overlay").append(image);
  }
  $("phrases-title").textContent = regions.length ? "Where it is" : "No part of it shows a known class";
  $("phrase-list").replaceChildren(...regions.map(({ name, colour, share }) =>
    element("li", {}, swatch(colour), element("span", { class: "percent" }, percent(share)), element("span", { dir: "auto" }, name))));
}

function draw() {
  const reason = answer?.reasons[why];
  const overlay = $("overlay");
  overlay.replaceChildren();
  $("phrases").hidden = $("overlay-choice").hidden = !reason && !answer?.objects;
  $("show-what").textContent = answer?.objects ? "Show where it is" : "Show what speaks for it";
  if (answer?.objects) return drawObjects(answer.objects);
  if (!reason) return;
  const shares = new Map();
  for (const { sentence, share } of reason.patches) shares.set(sentence, (shares.get(sentence) || 0) + share);
  const order = [...shares.keys()].sort((a, b) => shares.get(b) - shares.get(a));
  const colour = (sentence) => COLOURS[Math.min(order.indexOf(sentence), COLOURS.length - 1)];

  if ($("show-patches").checked) {
    const n = answer.grid;
    place(overlay, n);
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
    const share = element("span", { class: "percent" }, percent(shares.get(sentence)));
    return element("li", {}, swatch(colour(sentence)), share, element("span", { dir: "auto" }, sentence));
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
    await know((await api("learn", { method: "POST", body: form })).classes);
    chosen = [];
    showChosen();
    $("name").value = $("sentences").value = "";
    return `Learned “${name}”.`;
  });
}

async function changing(text, problem, change, status = "teach-status") {
  if (busy) return;
  busy = true;
  tell(problem, "");
  $(status).textContent = text;
  $("progress").removeAttribute("value");
  $("progress").hidden = status !== "teach-status";
  enable();
  const polling = setInterval(async () => {
    const share = await api("health", {}, false).then((now) => now.learning, () => null);
    if (busy && share) $("progress").value = share;
  }, 1000);
  try {
    $(status).textContent = await change();
    if (looked.length) lookAgain();
  } catch (error) {
    $(status).textContent = "";
    tell(problem, error.message);
  } finally {
    clearInterval(polling);
    busy = false;
    $("progress").hidden = true;
    enable();
  }
}

function enable() {
  for (const button of [$("learn"), $("correct"), $("undo"), ...$("known").querySelectorAll("button")]) button.disabled = busy;
}

// --- what is known --------------------------------------------------------------------------------------------------

async function know(classes) {
  $("summary").textContent = `It knows ${counted(classes.length, "class", "classes")} and keeps no picture.`;
  $("names").replaceChildren(...classes.map(({ name }) => element("option", { value: name })));
  $("known").replaceChildren(...classes.map(({ name, images }) => {
    const row = element(
      "li", {}, element("span", { class: "name", dir: "auto" }, name), element("span", { class: "soft" }, counted(images, "picture")),
    );
    if (health.may_change && classes.length > 1) {
      const button = element("button", { type: "button", "aria-label": `Forget ${name}` }, "Forget");
      button.addEventListener("click", () => forget(name));
      row.append(button);
    }
    return row;
  }));
  enable();
  const [good, done] = await Promise.all([api("estimate"), api("history")].map((asked) => asked.catch(() => null)));
  judge(good);
  recall(done);
}

// Ask once more before what cannot be taken back; whether to go on
function ask(title, text, no, yes) {
  $("ask-title").textContent = title;
  $("ask-text").textContent = text;
  $("ask-no").textContent = no;
  $("ask-yes").textContent = yes;
  $("ask").returnValue = "keep";
  return new Promise((done) => {
    $("ask").onclose = () => done($("ask").returnValue === "go");
    $("ask").showModal();
  });
}

async function forget(name) {
  const text = "It will no longer be told apart. To have it back, it must be taught again.";
  if (!(await ask(`Forget “${name}”?`, text, "Keep it", "Forget it"))) return;
  await changing(`Forgetting “${name}” …`, "known-problem", async () => {
    await know((await api(`classes/${encodeURIComponent(name)}`, { method: "DELETE" })).classes);
    $("known-title").focus();
    return `Forgot “${name}”.`;
  });
}

// --- how good it is, and what was done --------------------------------------------------------------------------------

const rounded = (n) => String(n < 10 ? +n.toFixed(1) : Math.round(n));

function judge(good) {
  $("good").hidden = good?.accuracy == null;
  if ($("good").hidden) return;
  const [low, high] = good.interval;
  $("accuracy").textContent = `About ${percent(good.accuracy)} of new pictures right (${percent(low)} to ${percent(high)})`;
  $("sources").textContent = `Estimated from ${good.sources.join(" and ")}; every class counts the same.`;
  $("confused-title").hidden = !good.confused.length;
  $("confused").replaceChildren(...good.confused.map(({ first, second, pictures, advice }, i) => {
    const again = advice === good.confused[i + 1]?.advice; // told once, below the last of those that it is for
    const said = again ? [] : [element("span", { class: "soft" }, advice[0].toUpperCase() + advice.slice(1))];
    return element("li", {}, `${first} and ${second}, ${counted(rounded(pictures), "picture")}`, ...said);
  }));
  const { shown, confusions, others, classes } = good;
  const some = shown.length < classes.length;
  $("matrix-choice").hidden = shown.length < 2;
  $("matrix-hint").textContent = `Of left-out pictures of a class (row), how many are taken for which (column)${some ? "; the classes that are mixed up most" : ""}.`;
  const heads = [...shown, ...(some ? ["others"] : [])];
  const head = element("tr", {}, element("td"), ...heads.map((name) => element("th", { scope: "col", title: name }, element("span", {}, name))));
  const lines = confusions.map((line, i) => {
    const numbers = some ? [...line, others[i]] : line;
    const whole = line.reduce((a, b) => a + b, others[i]) || 1;
    return element("tr", {}, element("th", { scope: "row", title: shown[i] }, shown[i]), ...numbers.map((n, j) => {
      const made = element("td", { class: i === j ? "right" : "wrong" }, n >= 0.05 ? rounded(n) : "");
      made.style.setProperty("--share", Math.min(1, 2 * n / whole));
      return made;
    }));
  });
  $("matrix").replaceChildren(element("thead", {}, head), element("tbody", {}, ...lines));
}

function recall(done) {
  $("changes").hidden = !done?.entries.length;
  if (!done) return;
  $("history").replaceChildren(...[...done.entries].reverse().map(({ date, change, names }) => {
    const called = names.length ? `: ${names.slice(0, 5).join(", ")}${names.length > 5 ? `, and ${names.length - 5} more` : ""}` : "";
    return element("li", {}, element("time", { class: "soft", datetime: date }, date), element("span", {}, change + called));
  }));
  $("undo").hidden = !health.may_change || !done.undoable;
}

async function undo() {
  const text = "What it learned, forgot or was corrected in last is taken back. This cannot itself be undone.";
  if (!(await ask("Undo the last change?", text, "Leave it", "Undo it"))) return;
  await changing("Undoing …", "changes-problem", async () => {
    await know((await api("undo", { method: "POST" })).classes);
    $("changes-title").focus();
    return "The last change is undone.";
  }, "changes-status");
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

takes("drop", "file", look);
takes("teach-drop", "files", choose);

document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.length && !$("look").hidden) look(files);
});

$("picture").addEventListener("error", () => { $("view").hidden = true; $("no-preview").hidden = false; });
$("picture").addEventListener("load", () => {
  $("view").style.setProperty("--ratio", $("picture").naturalWidth / $("picture").naturalHeight);
  $("view").hidden = false;
  $("no-preview").hidden = true;
});
$("show-patches").addEventListener("change", draw);
$("known-title").tabIndex = $("changes-title").tabIndex = -1;
$("csv").addEventListener("click", download);
$("undo").addEventListener("click", undo);
$("camera-on").addEventListener("click", openCamera);
$("camera-off").addEventListener("click", closeCamera);
$("snap").addEventListener("click", async () => { const file = await snap(); if (file) look([file]); });
$("snap-teach").addEventListener("click", async () => { const file = await snap(); if (file) choose([file]); });
$("mend-form").addEventListener("submit", (event) => { event.preventDefault(); correct(); });

function threshold() {
  $("threshold-value").textContent = percent(Number($("threshold").value));
}
$("threshold").addEventListener("input", () => { threshold(); looked.forEach(tellRow); say(); });
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
