// Print how many tests the files hold, and the sum of all bytes of their tensors.
#[path = "minipeft_vectors.rs"]
mod minipeft_vectors;
use minipeft_vectors::{bytes, load, Result, Tensor};

fn total<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> Result<u64> {
    let mut sum = 0;
    for tensor in tensors {
        sum += bytes(tensor)?.iter().map(|byte| u64::from(*byte)).sum::<u64>();
    }
    Ok(sum)
}

fn main() -> Result<()> {
    let (mut cases, mut sum) = (0, 0);
    for path in std::env::args().skip(1) {
        let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
        for group in load(&text)?.testGroups {
            for test in &group.tests {
                cases += 1;
                sum += total(test.inputs.values())?;
                sum += total(test.outputs.iter().flat_map(|named| named.values()))?;
            }
        }
    }
    println!("{} {}", cases, sum);
    Ok(())
}
