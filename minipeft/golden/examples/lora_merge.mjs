// LoRA's merge, verified in one process:
//   minipeft verify --exec "node lora_merge.mjs" --persistent
import { createInterface } from "node:readline";

class Refused extends Error {}

function floats(tensor) {
  const raw = Uint8Array.from(Buffer.from(tensor.data, "hex"));
  return new Float32Array(raw.buffer);
}

function written(values, shape) {
  return { dtype: "float32", shape, data: Buffer.from(values.buffer).toString("hex") };
}

// W + alpha/r * B A, or alpha/sqrt(r) where it is rank-stabilized.
function lora_merge({ W, A, B }, { alpha, rank_stabilized }) {
  const other = [W, A, B].find((tensor) => tensor.dtype !== "float32");
  if (other) return { unsupported: other.dtype };
  const [[out, width], r] = [W.shape, A.shape[0]];
  if (A.shape[1] !== width || B.shape[0] !== out || B.shape[1] !== r)
    throw new Refused("A or B does not fit");
  if (r < 1) throw new Refused("r is 0");
  const s = alpha / (rank_stabilized ? Math.sqrt(r) : r);
  const [merged, a, b] = [W, A, B].map(floats);
  for (let o = 0; o < out; o++)
    for (let i = 0; i < width; i++) {
      let sum = 0;
      for (let k = 0; k < r; k++) sum += b[o * r + k] * a[k * width + i];
      merged[o * width + i] += s * sum;
    }
  return { outputs: { merged: written(merged, W.shape) } };
}

const operations = { lora_merge };

function answer({ operation, inputs, parameters }) {
  if (!(operation in operations)) return { unsupported: `no ${operation}` };
  try {
    return operations[operation](inputs, parameters);
  } catch (error) {
    if (error instanceof Refused) return { refused: error.message };
    return { accident: String(error) };
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  if (request.command === "stop") break;
  const said =
    request.command === "start"
      ? { ready: "lora_merge.mjs", offers: Object.keys(operations) }
      : { id: request.id, ...answer(request) };
  console.log(JSON.stringify(said));
}
process.exit(0);
