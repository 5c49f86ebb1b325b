import { Problem, getJSON, messagesOf, partOf, pruneOf, stream } from "./api.js";
import { asCurl, asPython } from "./code.js";
import { draw } from "./draw.js";
import { readFiles } from "./media.js";
import { hideRead, showRead } from "./read.js";
import { BUDGETS, MODES, MODES_OF_VIDEO, PRESETS, cacheText, median, readText, steps, time, verdict } from "./words.js";

const $ = (id) => document.getElementById(id);
const MEASURE_AGAIN_MS = 3000; // first words that took less together are asked for twice more
const NAMES = { pruned: "Pruned", stock: "Stock" };

let setup = { max_image_bytes: Infinity, max_body_bytes: Infinity, demo_questions: [], needs_key: false, presets: {}, default: null };
let model = "star-edge";
let media = null; // what `readFiles` gives of a picture or a video
let choosing = 0; // files that were chosen last: they are read meanwhile
let turns = []; // {turn: its element, question, answers: {side: text}}: what the next question goes on from
let running = null; // AbortController of the question under way

const settings = () => ({
  preset: $("preset").value,
  share: Number($("share").value),
  size: Number($("size").value),
  repeats: $("repeats").checked,
  budget: $("budget").value,
});
const mode = () => document.querySelector("input[name=mode]:checked").value;

// ---- the picture or video ----

async function useFiles(files) {
  const mine = ++choosing;
  showError(null);
  let chosen;
  try {
    chosen = await readFiles(files, setup);
  } catch (error) {
    return mine === choosing && showError(error instanceof Problem ? error : new Problem(`The file cannot be read (${error.message}). Choose it again.`));
  }
  if (mine !== choosing) return;
  newConversation();
  media = chosen;
  const { image, isVideo, isSeries, name, text } = media;
  if (image) draw($("picture"), image);
  $("drop").classList.toggle("has-picture", image !== null);
  $("hint-title").textContent = image ? "Choose a picture or a video" : name;
  $("picture-name").textContent = `${name}, ${text}`;
  $("drop").setAttribute("aria-label", `${$("picture-name").textContent}. Choose another picture or video`);
  $("examples").hidden = true;
  $("frames-row").hidden = !isVideo;
  $("fps-field").hidden = isSeries; // pictures have no times
  $("intro").textContent = `Ask about the ${noun()}. Further questions go on from there; another ${noun()} begins anew.`;
  explain();
}

const noun = () => (media.isVideo ? "video" : "picture");

// What a number field asks for. undefined: nothing, so that the server's default holds.
function numberIn(id) {
  const field = $(id);
  if (field.validity.badInput) throw new Problem(`"${field.labels[0].textContent.trim()}" is not a number. Type one, or leave it empty.`);
  return field.value === "" ? undefined : Number(field.value);
}

function newConversation() {
  stop();
  turns = [];
  $("turns").replaceChildren();
  hideRead();
  $("again").hidden = true;
  $("intro").hidden = false;
  say("");
}

// ---- what goes on ----

let since = 0;
let ticking = null;

// Says what goes on. Only the words are read out, not the seconds.
function say(text, hasClock = false) {
  if ($("status").textContent !== text) $("status").textContent = text;
  clearInterval(ticking);
  $("clock").textContent = "";
  if (!hasClock) return;
  const tick = () => ($("clock").textContent = time(performance.now() - since));
  ticking = setInterval(tick, 100);
  tick();
}

// While nothing comes, the server may be answering others.
async function watchQueue(name, signal, isReading) {
  while (!signal.aborted && isReading()) {
    await new Promise((resolve) => setTimeout(resolve, 1000));
    const health = await getJSON("health", "").catch(() => null);
    if (signal.aborted || !isReading()) return;
    const others = health ? health.waiting : 0;
    say(others ? `${name}: reading, or waiting for its turn (${others} in line)` : `${name}: reading the ${noun()} and the question`, true);
  }
}

function showError(error) {
  $("error").hidden = !error;
  $("error").textContent = error ? error.message : "";
  if (!error?.needsKey) return;
  $("settings").open = true;
  $("key").focus();
}

function setRunning(controller) {
  const [shown, hidden] = controller ? [$("stop"), $("ask")] : [$("ask"), $("stop")];
  const hadFocus = document.activeElement === hidden;
  running = controller;
  shown.hidden = false;
  hidden.hidden = true;
  if (hadFocus) (controller ? shown : $("question")).focus();
}

function stop() {
  if (!running) return;
  running.abort();
  setRunning(null);
  say("Stopped.");
}

// ---- questions ----

// The fields of the presets by name. Where the settings change the server's own config, it is asked what that is.
async function knownPresets() {
  const isChanged = settings().preset === "server" && pruneOf(settings(), {}) !== undefined;
  if (!isChanged) return setup.presets;
  const [{ star_edge: says }] = (await getJSON("v1/models", $("key").value)).data;
  return { ...setup.presets, server: says.default.config };
}

function bodyOf(side, question, isFair, presets) {
  const prune = side === "stock" ? "off" : pruneOf(settings(), presets);
  return {
    messages: messagesOf(turns, side, question, partOf(media, { nframes: numberIn("frames"), fps: numberIn("fps") })),
    ...(prune === undefined ? {} : { prune }),
    max_tokens: Number($("length").value) || 256,
    temperature: 0,
    repeat_penalty: 1,
    // Fair: nothing that an earlier question left in the caches shortens the time of one side alone.
    star_edge: { kept: true, frames: media.isVideo, afresh: isFair },
  };
}

function makeTurn(question, sides, bodies) {
  const turn = $("turn-template").content.cloneNode(true).firstElementChild;
  turn.querySelector(".asked").textContent = question;
  const cards = {};
  for (const side of sides) {
    const card = $("side-template").content.cloneNode(true).firstElementChild;
    card.classList.add(side, "working");
    card.querySelector("h4").textContent = side === "pruned" ? `${NAMES[side]}: ${presetName()}` : NAMES[side];
    card.querySelector(".answer").setAttribute("aria-busy", "true");
    cards[side] = card;
    turn.querySelector(".sides").append(card);
  }
  const body = bodies[sides[0]];
  const { files } = media;
  const snippet = (make) => make(body, model, files, setup.needs_key);
  const code = turn.querySelector(".snippet pre");
  turn.querySelector(".code").addEventListener("click", (event) => {
    const box = turn.querySelector(".snippet");
    box.hidden = !box.hidden;
    event.target.setAttribute("aria-expanded", String(!box.hidden));
    if (!code.textContent) code.textContent = snippet(asCurl);
  });
  for (const [button, make] of [[".copy-curl", asCurl], [".copy-python", asPython]]) {
    turn.querySelector(button).addEventListener("click", async () => {
      code.textContent = snippet(make);
      turn.querySelector(".copied").textContent = await navigator.clipboard.writeText(code.textContent).then(() => "Copied.", () => "Select it below to copy.");
    });
  }
  $("intro").hidden = true;
  $("again").hidden = false;
  $("turns").append(turn);
  turn.scrollIntoView({ block: "nearest" });
  return { turn, cards };
}

const presetName = () => $("preset").selectedOptions[0].textContent.toLowerCase();

// Asks one side, and shows its answer as it comes. Returns the text and the report.
async function answer(side, body, card, signal) {
  const put = (part, text) => (card.querySelector(`.${part}`).textContent = text);
  since = performance.now();
  let [text, report, isReading] = ["", null, true];
  say(`${NAMES[side]}: reading the ${noun()} and the question`, true);
  watchQueue(NAMES[side], signal, () => isReading);
  try {
    for await (const chunk of stream(body, $("key").value, signal)) {
      const [choice] = chunk.choices;
      if (choice?.delta?.content) {
        if (isReading) say(`${NAMES[side]}: answering`, true);
        isReading = false;
        text += choice.delta.content;
        put("answer", text.trimStart());
      }
      if (choice?.finish_reason === "length") put("notes", `The answer was cut at ${body.max_tokens} tokens: raise "Longest answer" under Settings. `);
      report = chunk.star_edge || report;
    }
  } finally {
    isReading = false;
    card.classList.remove("working");
    card.querySelector(".answer").removeAttribute("aria-busy");
  }
  if (!text.trim()) put("answer", "(no words)");
  if (report) showReport(card, report);
  return { text, report };
}

function showReport(card, report) {
  card.querySelector(".words").textContent = `${readText(report, report.milliseconds.first_token)} ${cacheText(report)}`;
  card.querySelector(".notes").textContent += report.notes.map((note) => `${/^[a-z]+ /.test(note) ? note[0].toUpperCase() : note[0]}${note.slice(1)}.`).join(" ");
  card.querySelector(".times").hidden = false;
  card.querySelector("tbody").replaceChildren(
    ...steps(report.milliseconds).map(([what, howLong]) => {
      const row = document.createElement("tr");
      const [name, value] = [document.createElement("th"), document.createElement("td")];
      name.scope = "row";
      [name.textContent, value.textContent] = [what, howLong];
      row.append(name, value);
      return row;
    }),
  );
}

// A single short time says little on a machine that does other things too, such as to draw this page.
async function compare(results, bodies, { turn, cards }, signal) {
  const times = Object.fromEntries(Object.entries(results).map(([side, { report }]) => [side, [report.milliseconds.first_token]]));
  const show = () => {
    const medians = Object.fromEntries(Object.entries(times).map(([side, values]) => [side, median(values)]));
    const longest = Math.max(...Object.values(medians));
    for (const [side, ms] of Object.entries(medians)) {
      cards[side].querySelector(".words").textContent = readText(results[side].report, ms);
      cards[side].querySelector(".bar").style.width = `${(100 * ms) / longest}%`;
      cards[side].classList.add("compared");
    }
    return verdict(medians.pruned, medians.stock, results.pruned.text === results.stock.text);
  };
  turn.querySelector(".verdict").textContent = show();
  const once = Object.values(times).reduce((sum, [first]) => sum + first, 0);
  for (let round = 0; round < 2 && once < MEASURE_AGAIN_MS; round++) {
    since = performance.now();
    say("Both times are short: measured again", true);
    for (const side of Object.keys(times)) {
      for await (const chunk of stream({ ...bodies[side], max_tokens: 1, star_edge: { afresh: true } }, $("key").value, signal)) {
        if (chunk.star_edge) times[side].push(chunk.star_edge.milliseconds.first_token);
      }
    }
  }
  turn.querySelector(".verdict").textContent = show();
}

function showTooLong({ turn, cards: { stock } }, error) {
  stock.querySelector(".answer").textContent = "(no answer)";
  stock.querySelector(".notes").textContent = error.message;
  turn.querySelector(".verdict").textContent = "Nothing to compare: without pruning this does not fit the context.";
}

async function ask(question) {
  stop();
  showError(null);
  if (!media) {
    showError(new Problem("There is no picture yet. Choose one or a video, or take the demo picture."));
    return $("drop").focus();
  }
  const chosen = mode();
  const sides = chosen === "both" ? ["pruned", "stock"] : [chosen];
  const mine = new AbortController();
  setRunning(mine);
  let bodies;
  try {
    const presets = await knownPresets();
    if (mine.signal.aborted) return;
    bodies = Object.fromEntries(sides.map((side) => [side, bodyOf(side, question, chosen === "both", presets)]));
  } catch (error) {
    if (running !== mine) return;
    setRunning(null);
    return showError(error);
  }
  const { image, isVideo } = media;
  const shown = makeTurn(question, sides, bodies);
  const results = {};
  try {
    for (const side of sides) {
      try {
        results[side] = await answer(side, bodies[side], shown.cards[side], mine.signal);
      } catch (error) {
        if (!error.isTooLong || !results.pruned) throw error;
        showTooLong(shown, error); // stock alone: what pruning left has fit
      }
    }
    turns.push({ turn: shown.turn, question, answers: Object.fromEntries(Object.entries(results).map(([side, { text }]) => [side, text])) });
    $("question").value = "";
    const { report } = results[sides[0]];
    if (report && (isVideo || sides[0] === "pruned")) {
      const button = shown.turn.querySelector(".show");
      button.addEventListener("click", () => showRead(report, image, question).then(() => $("read-part").scrollIntoView({ block: "nearest" })));
      button.hidden = false;
      await showRead(report, image, question);
    }
    if (results.pruned && results.stock) await compare(results, bodies, shown, mine.signal);
    say("Done.");
  } catch (error) {
    const isKept = turns.at(-1)?.turn === shown.turn;
    for (const card of Object.values(shown.cards)) {
      card.classList.remove("working");
      if (!isKept) card.querySelector(".notes").textContent += "This question did not come to its end: the conversation goes on without it.";
    }
    if (!mine.signal.aborted) {
      say("");
      if (!Object.values(shown.cards).some((card) => card.querySelector(".answer").textContent)) shown.turn.remove();
      if (error.isTooLong) error.message += ` On this page: ${isVideo ? "take fewer frames, " : ""}choose a smaller preset or resolution under Settings${turns.length ? ", or begin a new conversation: its questions and answers take room too" : ""}.`;
      showError(error instanceof Problem ? error : new Problem(`The page failed (${error.message}). Load it again.`));
    }
  } finally {
    if (running === mine) setRunning(null);
    if (!mine.signal.aborted) shown.turn.scrollIntoView({ block: "nearest" });
  }
}

// ---- settings ----

function explain() {
  const { preset, share, budget } = settings();
  $("mode-text").textContent = (media?.isVideo ? MODES_OF_VIDEO : MODES)[mode()];
  $("budget-text").textContent = BUDGETS[budget];
  $("frames").placeholder = $("fps").value ? "256" : "8";
  $("preset-text").textContent = PRESETS[preset] || "A config that the server was started with.";
  $("share-row").hidden = preset !== "share";
  $("share-text").textContent = `about ${share}%`;
}

function fillPresets() {
  const options = Object.keys(setup.presets).map((name) => [name, name]);
  if (!(setup.default in setup.presets)) options.unshift(["server", "the server's own"]);
  options.push(["share", "my own share"]);
  $("preset").replaceChildren(...options.map(([value, text]) => new Option(text, value, false, value === (setup.default ?? "server"))));
}

// ---- events ----

async function useDemo() {
  const demo = await (await fetch("page/demo.png")).blob();
  await useFiles([new File([demo], "demo.png", { type: "image/png" })]);
  $("examples").hidden = false;
  if (!$("question").value) $("question").value = setup.demo_questions[0];
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (question && !running) ask(question);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
});
document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
$("stop").addEventListener("click", stop);
$("again").addEventListener("click", () => (newConversation(), $("question").focus()));
$("drop").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", (event) => {
  const files = [...event.target.files];
  if (files.length) useFiles(files);
  event.target.value = ""; // the same file may be chosen again
});
$("demo").addEventListener("click", () => useDemo().catch(showError));
for (const id of ["preset", "share", "modes", "budget", "fps"]) $(id).addEventListener("input", explain);
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    const files = kind === "drop" ? [...event.dataTransfer.files] : [];
    if (files.length) useFiles(files);
  });
}
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files].filter((one) => /^(image|video)[/]/.test(one.type));
  if (!files.length) return;
  event.preventDefault();
  useFiles(files);
});

new ResizeObserver(() => document.documentElement.style.setProperty("--form-height", `${$("form").offsetHeight}px`)).observe($("form"));

async function begin() {
  explain();
  setup = { ...setup, ...(await getJSON("page/setup.json", "")) };
  fillPresets();
  explain();
  if (setup.needs_key) $("key-text").textContent = "This server was started with one. It stays in this tab.";
  for (const question of setup.demo_questions) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = question;
    button.addEventListener("click", () => {
      $("question").value = question;
      if (!running) ask(question);
    });
    $("examples").append(button);
  }
  if (setup.needs_key) return;
  model = (await getJSON("v1/models", "")).data[0].id;
  $("model").textContent = model;
}
begin().catch(showError);
