// Print how many tests the files hold, and the sum of all bytes of their tensors.
import { readFileSync } from "node:fs";

let cases = 0;
let sum = 0;
for (const path of process.argv.slice(2))
  for (const group of load(readFileSync(path, "utf8")).testGroups)
    for (const test of group.tests) {
      cases++;
      for (const named of [test.inputs, test.outputs ?? {}])
        for (const tensor of Object.values(named))
          for (const byte of bytes(tensor)) sum += byte;
    }
console.log(`${cases} ${sum}`);
