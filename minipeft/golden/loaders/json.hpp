// JSON, as much as the vectors need. Anything that is no JSON throws std::runtime_error.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace minipeft {

struct Json {
    enum Kind { Null, Bool, Number, Text, List, Map } kind = Null;
    double number = 0;  // also of a Bool
    std::string text;   // also of a Number, with all its digits
    std::vector<Json> items;
    std::map<std::string, Json> members;

    bool has(const std::string &name) const { return members.count(name) > 0; }
    const Json &at(const std::string &name) const {
        auto found = members.find(name);
        if (found == members.end()) throw std::runtime_error("no " + name);
        return found->second;
    }
    static Json parse(const std::string &text);
};

namespace detail {
struct Parser {
    const char *at, *end;

    [[noreturn]] void fail() const { throw std::runtime_error("no JSON"); }
    char peek() {
        while (at < end && std::string(" \t\r\n").find(*at) != std::string::npos) ++at;
        return at < end ? *at : '\0';
    }
    void expect(char c) {
        if (peek() != c) fail();
        ++at;
    }
    Json word(const std::string &name, Json::Kind kind, double number) {
        if (std::string(at, at + std::min<std::size_t>(name.size(), end - at)) != name)
            fail();
        at += name.size();
        Json json;
        json.kind = kind;
        json.number = number;
        return json;
    }
    unsigned hex4() {
        if (end - at < 4) fail();
        std::string digits(at, at + 4);
        at += 4;
        return static_cast<unsigned>(std::strtoul(digits.c_str(), nullptr, 16));
    }
    static void utf8(std::string &to, unsigned code) {
        if (code < 0x80) {
            to += char(code);
        } else if (code < 0x800) {
            to += char(0xC0 | code >> 6);
            to += char(0x80 | (code & 0x3F));
        } else if (code < 0x10000) {
            to += char(0xE0 | code >> 12);
            to += char(0x80 | (code >> 6 & 0x3F));
            to += char(0x80 | (code & 0x3F));
        } else {
            to += char(0xF0 | code >> 18);
            to += char(0x80 | (code >> 12 & 0x3F));
            to += char(0x80 | (code >> 6 & 0x3F));
            to += char(0x80 | (code & 0x3F));
        }
    }
    std::string text() {
        std::string found;
        expect('"');
        for (;;) {
            if (at >= end) fail();
            char c = *at++;
            if (c == '"') return found;
            if (c != '\\') {
                found += c;
                continue;
            }
            if (at >= end) fail();
            c = *at++;
            const std::string from = "nrtbf", to = "\n\r\t\b\f";
            if (c == 'u') {
                unsigned code = hex4();
                if (code >= 0xD800 && code < 0xDC00 && end - at > 6) {
                    at += 2;  // the second half of a surrogate pair
                    code = 0x10000 + ((code - 0xD800) << 10) + (hex4() - 0xDC00);
                }
                utf8(found, code);
            } else {
                auto i = from.find(c);
                found += i == std::string::npos ? c : to[i];
            }
        }
    }
    Json value(int depth) {
        if (depth > 64) fail();
        Json json;
        switch (peek()) {
        case '{':
            json.kind = Json::Map;
            ++at;
            if (peek() == '}') return ++at, json;
            do {
                peek();
                std::string name = text();
                expect(':');
                json.members[name] = value(depth + 1);
            } while (peek() == ',' && at++);
            expect('}');
            return json;
        case '[':
            json.kind = Json::List;
            ++at;
            if (peek() == ']') return ++at, json;
            do json.items.push_back(value(depth + 1));
            while (peek() == ',' && at++);
            expect(']');
            return json;
        case '"':
            json.kind = Json::Text;
            json.text = text();
            return json;
        case 't': return word("true", Json::Bool, 1);
        case 'f': return word("false", Json::Bool, 0);
        case 'n': return word("null", Json::Null, 0);
        default: {
            const char *from = at;
            while (at < end && std::string("+-.eE0123456789").find(*at) != std::string::npos)
                ++at;
            if (from == at) fail();
            json.kind = Json::Number;
            json.text.assign(from, at);
            json.number = std::strtod(json.text.c_str(), nullptr);
            return json;
        }
        }
    }
};
}  // namespace detail

inline Json Json::parse(const std::string &text) {
    detail::Parser parser{text.data(), text.data() + text.size()};
    Json json = parser.value(0);
    if (parser.peek() != '\0') parser.fail();
    return json;
}

inline void read(const Json &json, Json &to) { to = json; }
inline void read(const Json &json, std::string &to) { to = json.text; }
inline void read(const Json &json, std::int64_t &to) {
    to = std::strtoll(json.text.c_str(), nullptr, 10);
}
template <class T> void read(const Json &json, std::vector<T> &to) {
    for (const Json &item : json.items) read(item, to.emplace_back());
}
template <class T> void read(const Json &json, std::map<std::string, T> &to) {
    for (const auto &[name, member] : json.members) read(member, to[name]);
}

}  // namespace minipeft
