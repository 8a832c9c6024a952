// LoRA's merge, verified in one process:
//   g++ -std=c++17 -O2 -o lora_merge lora_merge.cpp
//   minipeft verify --exec ./lora_merge --persistent
// The loader minipeft_vectors.hpp comes with the vectors: python -m minipeft.golden.archive --out .
#include <cmath>
#include <cstdio>
#include <cstring>
#include <iostream>

#include "minipeft_vectors.hpp"

using namespace minipeft;

struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

static std::vector<float> floats(const Tensor &tensor) {
    auto raw = bytes(tensor);
    std::vector<float> found(raw.size() / 4);
    std::memcpy(found.data(), raw.data(), raw.size());
    return found;
}

static std::string written(const std::vector<float> &values, std::int64_t rows,
                           std::int64_t columns) {
    std::string hex;
    char digits[3];
    const auto *raw = reinterpret_cast<const unsigned char *>(values.data());
    for (std::size_t i = 0; i < 4 * values.size(); i++) {
        std::snprintf(digits, sizeof digits, "%02x", raw[i]);
        hex += digits;
    }
    return "{\"dtype\": \"float32\", \"shape\": [" + std::to_string(rows) + ", " +
           std::to_string(columns) + "], \"data\": \"" + hex + "\"}";
}

// W + alpha/r * B A, or alpha/sqrt(r) where it is rank-stabilized.
static std::string lora_merge(std::map<std::string, Tensor> in, const Json &parameters) {
    for (const auto &[name, tensor] : in)
        if (tensor.dtype != "float32") return "\"unsupported\": \"" + tensor.dtype + "\"";
    auto W = floats(in["W"]), A = floats(in["A"]), B = floats(in["B"]);
    auto &w = in.at("W").shape, &a = in.at("A").shape;
    auto out = w.at(0), width = w.at(1), r = a.at(0);
    using Shape = std::vector<std::int64_t>;
    if (in["A"].shape != Shape{r, width} || in["B"].shape != Shape{out, r})
        throw Refused("A or B does not fit");
    if (r < 1) throw Refused("r is 0");
    bool stable = parameters.at("rank_stabilized").number != 0;
    double s = parameters.at("alpha").number / (stable ? std::sqrt(double(r)) : double(r));
    for (std::int64_t o = 0; o < out; o++)
        for (std::int64_t i = 0; i < width; i++) {
            double sum = 0;
            for (std::int64_t k = 0; k < r; k++)
                sum += double(B[o * r + k]) * A[k * width + i];
            W[o * width + i] = float(W[o * width + i] + s * sum);
        }
    return "\"outputs\": {\"merged\": " + written(W, out, width) + "}";
}

int main() {
    for (std::string line; std::getline(std::cin, line);) {
        Json request = Json::parse(line);
        const std::string &command = request.at("command").text;
        if (command == "stop") break;
        if (command == "start") {
            std::cout << R"({"ready": "lora_merge.cpp", "offers": ["lora_merge"]})" << std::endl;
            continue;
        }
        std::string said;
        try {
            std::map<std::string, Tensor> inputs;
            read(request.at("inputs"), inputs);
            said = lora_merge(inputs, request.at("parameters"));
        } catch (const Refused &reason) {
            said = "\"refused\": \"" + std::string(reason.what()) + "\"";
        }
        std::cout << "{\"id\": " << request.at("id").text << ", " << said << "}" << std::endl;
    }
}
