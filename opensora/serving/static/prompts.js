// A prompt with a text for each clip, in the notation of Open-Sora 1.2: |0|text|1|text.

/** The texts of the clips; a prompt without numbers is the first. A clip without a text goes on with the one before. */
export function textsOf(prompt) {
  const parts = prompt.split(/\|(\d+)\|/);
  if (parts.length < 3 || parts[0].trim()) return [prompt];
  const texts = [];
  for (let index = 1; index < parts.length; index += 2) texts[Number(parts[index])] = parts[index + 1].trim();
  return texts;
}

/** The prompt of these texts. */
export function promptOf([first, ...others]) {
  if (!others.some(Boolean)) return first;
  return `|0|${first}` + others.map((text, index) => (text ? `|${index + 1}|${text}` : "")).join("");
}

/** A prompt as people read it. */
export const readable = (prompt) => textsOf(prompt).filter(Boolean).join(" \u2192 ");
