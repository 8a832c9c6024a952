// Print how many tests the files hold, and the sum of all bytes of their tensors.
#include <fstream>
#include <iostream>
#include <sstream>

#include "minipeft_vectors.hpp"

static long total(const std::map<std::string, minipeft::Tensor> &named) {
    long sum = 0;
    for (const auto &[name, tensor] : named)
        for (unsigned char byte : minipeft::bytes(tensor)) sum += byte;
    return sum;
}

int main(int count, char **paths) {
    long cases = 0, sum = 0;
    for (int i = 1; i < count; i++) {
        std::stringstream text;
        text << std::ifstream(paths[i]).rdbuf();
        for (const auto &group : minipeft::load(text.str()).testGroups)
            for (const auto &test : group.tests) {
                cases++;
                sum += total(test.inputs);
                if (test.outputs) sum += total(*test.outputs);
            }
    }
    std::cout << cases << " " << sum << std::endl;
}
