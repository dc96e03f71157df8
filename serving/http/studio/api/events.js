/** Server-sent events, read off a response: unlike EventSource this can send a key and a body. */

import { Problem } from "./http.js";

/** The events of `response`: {event, data, id}, `data` parsed. Ends with the stream. Throws Problem for `error` events. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const found = parse(block);
        if (found === null) continue;
        if (found.event === "error") throw new Problem(500, found.data.error);
        yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** One event; null for a comment, and for the end that OpenAI's streams have. */
function parse(block) {
  const found = { event: "message", data: "", id: null };
  for (const line of block.split(/\r?\n/)) {
    const [, name, text] = /^([a-z]+): ?(.*)$/.exec(line) ?? [];
    if (name === "data") found.data += text;
    else if (name) found[name] = text;
  }
  if (!found.data || found.data === "[DONE]") return null;
  return { ...found, data: JSON.parse(found.data) };
}
