// The picture, and what each stage kept of it. Dropped tokens are dimmed.

const MAX_SIDE = 720; // pixels of a drawn picture
const FRAME_SIDE = 480; // of a drawn frame, of which there may be many
const WHOLE = [0, 0, 1, 1]; // top, left, bottom, right, as fractions of the picture
const OVERLAP = 0.05; // of the smaller of two places: they do not lie beside each other

const area = ([top, left, bottom, right]) => Math.max(0, bottom - top) * Math.max(0, right - left);
const common = (a, b) => area([Math.max(a[0], b[0]), Math.max(a[1], b[1]), Math.min(a[2], b[2]), Math.min(a[3], b[3])]);

// Images in groups that lie beside each other: the whole picture, and its tiles.
function layersOf(images) {
  const layers = [];
  for (const image of [...images].sort((a, b) => area(b.place) - area(a.place))) {
    const fits = (layer) => layer.every((other) => common(image.place, other.place) <= OVERLAP * Math.min(area(image.place), area(other.place)));
    const layer = layers.find(fits);
    if (layer) layer.push(image);
    else layers.push([image]);
  }
  return layers;
}

// Where an image lies that nobody located: centred, padded to its grid's shape.
function padded(image, picture) {
  if (image.place || !image.grid) return image;
  const [rows, columns] = image.grid;
  const side = Math.max(picture.height / rows, picture.width / columns);
  const [down, across] = [(side * rows) / picture.height, (side * columns) / picture.width];
  return { ...image, place: [(1 - down) / 2, (1 - across) / 2, (1 + down) / 2, (1 + across) / 2] };
}

// The stages of a report, in the order of the computation. Each: title, and the tokens that it kept of an image.
function stagesOf(report) {
  const images = report.kept;
  const stages = [];
  if (images.some((image) => image.redundant?.length)) {
    stages.push(["Into the encoder", (image) => { const out = new Set(image.redundant); return [...Array(image.n_tokens).keys()].filter((i) => !out.has(i)); }]);
  }
  if (report.encoder_layer !== null) stages.push([`Encoder stage, from layer ${report.encoder_layer}`, (image) => image.encoder_kept || [...Array(image.n_tokens).keys()]]);
  stages.push([report.config ? "Vision stage" : "Every image token", (image) => image.vision_kept]);
  if (report.decoder_layer !== null) stages.push([`Decoder stage, from layer ${report.decoder_layer}`, (image) => image.decoder_kept]);
  return stages;
}

// Panels of a picture: {stage, part, count, draw(canvas)}. An empty list has a `problem` that says why.
export function panelsOf(report, picture, all = report.kept || [], side = MAX_SIDE) {
  const images = all.length === 1 ? [padded(all[0], picture)] : all;
  const placed = images.filter((image) => image.place && image.grid);
  if (!placed.length) {
    const problem = all.some((image) => image.grid) ? "Where this model's crops lie on the picture is not known, so nothing can be drawn." : "This model's image tokens have no place on the picture, so nothing can be drawn.";
    return Object.assign([], { problem });
  }
  const panels = [];
  const layers = layersOf(placed);
  for (const [stage, kept] of stagesOf(report)) {
    for (const layer of layers) {
      const part = layers.length === 1 ? "" : layer.length === 1 ? ", whole picture" : `, ${layer.length} tiles`;
      panels.push({ stage, part, count: count(layer, kept), draw: (canvas) => draw(canvas, picture, layer, kept, side) });
    }
  }
  panels.problem = placed.length < images.length ? `Places of ${images.length - placed.length} of ${images.length} crops are not known.` : "";
  return panels;
}

const count = (images, kept) => `${images.reduce((sum, image) => sum + kept(image).length, 0)} of ${images.reduce((sum, image) => sum + image.n_tokens, 0)} tokens`;

// Panels of a video's frames, as those of a picture, each with its frame. pictures: what to draw of each of report.frames.
// Where tokens have no place, a frame is drawn as it is.
export function framePanelsOf(report, pictures) {
  const panels = report.frames.flatMap((frame, i) => {
    const images = report.kept.filter((image) => image.picture === frame.picture);
    const found = panelsOf(report, pictures[i], images, FRAME_SIDE);
    const problem = found.problem;
    const drawn = found.length ? found : stagesOf(report).map(([stage, kept]) => ({ stage, part: "", count: count(images, kept), draw: (canvas) => draw(canvas, pictures[i], [], null, FRAME_SIDE) }));
    return drawn.map((panel) => ({ ...panel, frame, problem }));
  });
  panels.problem = panels.find((panel) => panel.problem)?.problem ?? "";
  return panels;
}

// Draws the picture. images: with place, grid and cells, whose dropped cells are dimmed. kept: an image's tokens that stayed.
export function draw(canvas, picture, images = [], kept = null, side = MAX_SIDE) {
  const edge = (pick, start, i) => pick(...images.map((image) => image.place[i]), start);
  const near = (value, whole) => (Math.abs(value - whole) < 0.005 ? whole : value);
  const top = near(edge(Math.min, 0, 0), 0), left = near(edge(Math.min, 0, 1), 0);
  const bottom = near(edge(Math.max, 1, 2), 1), right = near(edge(Math.max, 1, 3), 1);
  const scale = side / Math.max((bottom - top) * picture.height, (right - left) * picture.width);
  const [height, width] = [picture.height * scale, picture.width * scale];
  canvas.width = Math.max(1, Math.round((right - left) * width));
  canvas.height = Math.max(1, Math.round((bottom - top) * height));
  const paper = canvas.getContext("2d");
  paper.fillStyle = "#767676"; // padding
  paper.fillRect(0, 0, canvas.width, canvas.height);
  paper.imageSmoothingEnabled = scale < 1;
  paper.drawImage(picture, -left * width, -top * height, width, height);
  for (const image of images) cover(paper, image, kept(image), [top, left, height, width]);
  if (images.length > 1) {
    paper.strokeStyle = "#5aaaff"; // between tiles
    paper.lineWidth = 3;
    for (const { place } of images) paper.strokeRect((place[1] - left) * width, (place[0] - top) * height, (place[3] - place[1]) * width, (place[2] - place[0]) * height);
  }
}

function cover(paper, image, tokens, [top, left, height, width]) {
  const [rows, columns] = image.grid;
  const kept = new Set(tokens.map((token) => image.cells[token]));
  const [t, l, b, r] = image.place || WHOLE;
  const x = (column) => Math.round((l - left + ((r - l) * column) / columns) * width);
  const y = (row) => Math.round((t - top + ((b - t) * row) / rows) * height);
  const isKept = (row, column) => row >= 0 && column >= 0 && row < rows && column < columns && kept.has(row * columns + column);
  paper.fillStyle = "rgba(22, 21, 19, 0.76)";
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      if (!isKept(row, column)) paper.fillRect(x(column), y(row), x(column + 1) - x(column), y(row + 1) - y(row));
    }
  }
  const cell = Math.min((x(columns) - x(0)) / columns, (y(rows) - y(0)) / rows);
  if (cell < 5 || kept.size >= rows * columns) return;
  paper.strokeStyle = "#ffb52e";
  paper.lineWidth = cell < 16 ? 1 : 3;
  paper.beginPath();
  for (let row = 0; row <= rows; row++) {
    for (let column = 0; column <= columns; column++) {
      if (isKept(row, column) !== isKept(row - 1, column)) paper.moveTo(x(column), y(row)), paper.lineTo(x(column + 1), y(row));
      if (isKept(row, column) !== isKept(row, column - 1)) paper.moveTo(x(column), y(row)), paper.lineTo(x(column), y(row + 1));
    }
  }
  paper.stroke();
}
