// LoRA's merge, verified in one process:
//   rustc -O lora_merge.rs
//   minipeft verify --exec ./lora_merge --persistent
// The loader minipeft_vectors.rs comes with the vectors: python -m minipeft.golden.archive --out .
#[path = "minipeft_vectors.rs"]
mod minipeft_vectors;
use minipeft_vectors::{bytes, Json, Read, Result, Tensor};
use std::collections::BTreeMap;
use std::io::{stdin, BufRead};

fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    let raw = bytes(tensor)?;
    let words = raw.chunks_exact(4);
    Ok(words.map(|w| f32::from_le_bytes([w[0], w[1], w[2], w[3]])).collect())
}

fn written(values: &[f32], rows: i64, columns: i64) -> String {
    let raw = values.iter().flat_map(|v| v.to_le_bytes());
    let hex: String = raw.map(|byte| format!("{byte:02x}")).collect();
    format!(r#"{{"dtype": "float32", "shape": [{rows}, {columns}], "data": "{hex}"}}"#)
}

/// W + alpha/r * B A, or alpha/sqrt(r) where it is rank-stabilized.
fn lora_merge(inputs: &BTreeMap<String, Tensor>, parameters: &Json) -> Result<String> {
    if let Some(other) = inputs.values().find(|tensor| tensor.dtype != "float32") {
        return Ok(format!(r#""unsupported": "{}""#, other.dtype));
    }
    let (w, a, b) = (&inputs["W"], &inputs["A"], &inputs["B"]);
    let (out, width, r) = (w.shape[0], w.shape[1], a.shape[0]);
    if a.shape != [r, width] || b.shape != [out, r] {
        return Err("A or B does not fit".into());
    }
    if r < 1 {
        return Err("r is 0".into());
    }
    let stable = *parameters.at("rank_stabilized")? == Json::Bool(true);
    let divisor = if stable { (r as f64).sqrt() } else { r as f64 };
    let s = parameters.at("alpha")?.number()? / divisor;
    let (weights, a, b) = (floats(w)?, floats(a)?, floats(b)?);
    let merged: Vec<f32> = weights
        .iter()
        .enumerate()
        .map(|(at, &weight)| {
            let (o, i) = (at / width as usize, at % width as usize);
            let rank = 0..r as usize;
            let term = |k| f64::from(b[o * r as usize + k]) * f64::from(a[k * width as usize + i]);
            (f64::from(weight) + s * rank.map(term).sum::<f64>()) as f32
        })
        .collect();
    Ok(format!(r#""outputs": {{"merged": {}}}"#, written(&merged, out, width)))
}

fn run(request: &Json) -> Result<String> {
    let inputs = BTreeMap::<String, Tensor>::read(request.at("inputs")?)?;
    lora_merge(&inputs, request.at("parameters")?)
}

fn main() -> Result<()> {
    for line in stdin().lock().lines() {
        let request = Json::parse(&line.map_err(|error| error.to_string())?)?;
        match String::read(request.at("command")?)?.as_str() {
            "stop" => break,
            "start" => println!(r#"{{"ready": "lora_merge.rs", "offers": ["lora_merge"]}}"#),
            _ => {
                let id = i64::read(request.at("id")?)?;
                let said = run(&request).unwrap_or_else(|why| format!(r#""refused": "{why}""#));
                println!(r#"{{"id": {id}, {said}}}"#);
            }
        }
    }
    Ok(())
}
