// A job as a command, as Python, and as a request: what makes the same video elsewhere.

const FILES = ["image", "first_frame", "last_frame", "extend", "edit", "reference_path"];
const NAMES_OF_SIZE = ["size", "image_size", "width", "height", "resolution", "aspect_ratio"];

const shell = (value) => (/^[\w.,:/=+-]+$/.test(value) ? String(value) : `'${String(value).replaceAll("'", `'\\''`)}'`);
const flag = (name) => `--${name.replaceAll("_", "-")}`;

/** "style:0.8", an adapter of the server, as a file: "style.safetensors:0.8". */
const adapterFile = (use) => use.replace(/^[\w-]+/, "$&.safetensors");

/** The settings but the size; media and adapters by names that stand for their files. */
function settings(job) {
  const found = Object.entries(job.settings).filter(([name]) => !NAMES_OF_SIZE.includes(name))
    .map(([name, value]) => [name, name === "lora" ? value.map(adapterFile) : value]);
  const media = Object.keys(job.media ?? {}).filter((name) => FILES.includes(name)).map((name) => [name, `YOUR-${name.toUpperCase()}-FILE`]);
  return [...found, ...media];
}

/** `opensora generate ...` */
export function asCommand(job) {
  const words = ["opensora", "generate", shell(job.prompt), "--model", shell(job.model), "--size", job.size];
  for (const [name, value] of settings(job)) {
    if (value === true) words.push(flag(name));
    else if (value !== false && value !== null) words.push(flag(name), ...[value].flat().map(shell));
  }
  return words.join(" ");
}

const python = (value) => (value === true ? "True" : value === false ? "False" : value === null ? "None" : JSON.stringify(value));

/** Lines for Python. */
export function asPython(job) {
  const [width, height] = job.size.split("x");
  const given = [["height", Number(height)], ["width", Number(width)], ...settings(job)];
  return [
    "import opensora", "",
    `pipe = opensora.load(${python(job.model)})`,
    "video = pipe(", `    ${python(job.prompt)},`, ...given.map(([name, value]) => `    ${name}=${python(value)},`), ")",
    `video.save("video.${job.num_frames === 1 ? "png" : "mp4"}")`, "",
  ].join("\n");
}

/** A request with curl. */
export function asRequest(job) {
  const media = Object.fromEntries(Object.entries(job.media ?? {}).map(([name, ids]) => [name, ids.length > 1 ? ids : ids[0]]));
  const given = Object.fromEntries(Object.entries(job.settings).filter(([name]) => !NAMES_OF_SIZE.includes(name)));
  const body = JSON.stringify({ prompt: job.prompt, model: job.model, size: job.size, ...given, ...media });
  return `curl ${new URL("v1/videos", location.href)} -H 'Content-Type: application/json' -d ${shell(body)}`;
}
