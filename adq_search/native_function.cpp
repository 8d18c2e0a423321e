// Nodes of torch's graph that call C++ passes, forward and backward, without Python in between.
//
// `native_function.py` writes the passes of a function down as integers: what is allocated, which
// functions are called on what, what is kept for the backward pass. They are read once, here.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include <vector>

#include "native.hpp"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Integers one after the other, as `_program` of `native_function.py` writes them.
struct Reader {
    at::IntArrayRef code;
    size_t at = 0;

    int64_t next() { return code[at++]; }
    template <class Read>
    auto several(const Read read) {
        std::vector<decltype(read())> found(static_cast<size_t>(next()));
        for (auto& one : found) one = read();
        return found;
    }
    std::vector<int64_t> numbers() {
        return several([this] { return next(); });
    }
};

// A tensor like another one, of its type or of bytes; or of float32, with some numbers as sizes.
struct Room {
    enum Kind : int64_t { LIKE, BYTES, FLOATS } kind;
    std::vector<int64_t> of;

    Tensor make(const variable_list& tensors, at::ArrayRef<double> numbers) const {
        if (kind == FLOATS) {
            std::vector<int64_t> sizes;
            for (const int64_t i : of) sizes.push_back(static_cast<int64_t>(numbers[i]));
            return at::empty(sizes, at::kFloat);
        }
        const Tensor& like = tensors[of[0]];
        if (!like.defined()) return {};
        return kind == BYTES ? at::empty_like(like, like.options().dtype(at::kByte))
                             : at::empty_like(like);
    }
};

// A function, and its arguments: tensors, or numbers; less than 0 for none.
struct Call {
    enum Kind : int64_t { TENSOR, NUMBER, FIGURE, IS_HALF };
    struct Argument {
        Kind kind;
        int64_t at;
    };

    void (*function)(const Word*);
    std::vector<Argument> arguments;

    void run(const variable_list& tensors, at::ArrayRef<double> numbers) const {
        std::vector<Word> words;
        words.reserve(arguments.size());
        for (const auto& [kind, at] : arguments) {
            Word word{};
            if (at >= 0 && kind == TENSOR)
                word.place = tensors[at].defined() ? tensors[at].data_ptr() : nullptr;
            else if (at >= 0 && kind == NUMBER)
                word.number = static_cast<int64_t>(numbers[at]);
            else if (at >= 0 && kind == FIGURE)
                word.figure = static_cast<float>(numbers[at]);
            else if (kind == IS_HALF)
                word.number = tensors[at].scalar_type() == at::kBFloat16;
            words.push_back(word);
        }
        function(words.data());
    }
};

struct Pass {
    std::vector<Room> rooms;
    std::vector<Call> calls;

    explicit Pass(Reader& reader) {
        rooms = reader.several([&] {
            const auto kind = static_cast<Room::Kind>(reader.next());
            return Room{kind, reader.numbers()};
        });
        calls = reader.several([&] {
            Call call{reinterpret_cast<void (*)(const Word*)>(reader.next()), {}};
            call.arguments = reader.several([&] {
                const auto kind = static_cast<Call::Kind>(reader.next());
                return Call::Argument{kind, reader.next()};
            });
            return call;
        });
    }

    void run(variable_list& tensors, at::ArrayRef<double> numbers) const {
        for (const Room& room : rooms) tensors.push_back(room.make(tensors, numbers));
        for (const Call& call : calls) call.run(tensors, numbers);
    }
};

// Tensors are counted in this order: inputs, what the forward pass makes, gradients of the outputs,
// what the backward pass makes.
struct Program {
    Pass forward, backward;
    // What each gradient of an output is laid out as, and the gradient of each input; less than 0
    // for none.
    std::vector<int64_t> outputs, is_differentiable, layouts, kept, gradients;

    explicit Program(Reader reader)
        : forward(reader), backward(reader), outputs(reader.numbers()),
          is_differentiable(reader.numbers()), layouts(reader.numbers()), kept(reader.numbers()),
          gradients(reader.numbers()) {}
    size_t n_forward() const { return gradients.size() + forward.rooms.size(); }
};

inline const Program* known(int64_t address) { return reinterpret_cast<const Program*>(address); }

// What a call was given besides tensors; kept for its backward pass.
struct Given : torch::CustomClassHolder {
    const Program* program;
    std::vector<int64_t> places;  // of the inputs that are there
    std::vector<double> numbers;

    Given(const Program* program, at::ArrayRef<double> numbers)
        : program(program), numbers(numbers.vec()) {}
};

// With the type and the places in memory of another tensor of its shape.
Tensor laid_out_as(const Tensor& tensor, const Tensor& like) {
    if (tensor.scalar_type() == like.scalar_type() && tensor.strides() == like.strides())
        return tensor;
    return at::empty_like(like).copy_(tensor);
}

struct Node : torch::autograd::Function<Node> {
    static variable_list forward(AutogradContext* context, at::TensorList inputs,
                                 const c10::intrusive_ptr<Given>& given) {
        const Program& program = *given->program;
        variable_list tensors(program.gradients.size()), kept, out, without;
        for (size_t i = 0; i < inputs.size(); ++i) tensors[given->places[i]] = inputs[i];
        program.forward.run(tensors, given->numbers);
        for (const int64_t i : program.outputs) out.push_back(tensors[i]);
        for (size_t i = 0; i < out.size(); ++i)
            if (!program.is_differentiable[i]) without.push_back(out[i]);
        if (!without.empty()) context->mark_non_differentiable(without);
        for (const int64_t i : program.kept) kept.push_back(tensors[i]);
        context->save_for_backward(kept);
        context->saved_data["given"] = c10::IValue::make_capsule(given);
        return out;
    }

    static variable_list backward(AutogradContext* context, variable_list upstream) {
        const auto held = context->saved_data["given"].toCapsule();
        const Given& given = static_cast<const Given&>(*held);
        const Program& program = *given.program;
        variable_list tensors(program.n_forward()), gradients;
        {
            const at::AutoGradMode without_graph(false);
            const variable_list kept = context->get_saved_variables();
            for (size_t i = 0; i < kept.size(); ++i) tensors[program.kept[i]] = kept[i];
            for (size_t i = 0; i < upstream.size(); ++i) {
                const int64_t like = program.layouts[i];
                tensors.push_back(like < 0 ? upstream[i] : laid_out_as(upstream[i], tensors[like]));
            }
            program.backward.run(tensors, given.numbers);
            for (const int64_t input : given.places) {
                const int64_t i = program.gradients[input];
                gradients.push_back(i < 0 ? Tensor() : tensors[i]);
            }
        }
        gradients.emplace_back();  // of `given`
        if (!at::GradMode::is_enabled()) return gradients;
        // As `once_differentiable` of Python.
        for (Tensor& gradient : gradients)
            if (gradient.defined()) gradient = gradient.detach().set_requires_grad(true);
        const std::string why = "Quantizers and their norms have no second derivatives.";
        const int n = static_cast<int>(gradients.size());
        return torch::autograd::DelayedError(why, n).apply(std::move(gradients));
    }
};

// Returns the program's address; it lives as long as the process.
int64_t define(at::IntArrayRef code) {
    return reinterpret_cast<int64_t>(new Program(Reader{code}));
}

std::vector<Tensor> apply(int64_t program, const c10::List<std::optional<Tensor>>& inputs,
                          at::ArrayRef<double> numbers) {
    variable_list tensors;
    const auto given = c10::make_intrusive<Given>(known(program), numbers);
    for (size_t i = 0; i < inputs.size(); ++i) {
        const std::optional<Tensor> one = inputs.get(i);
        if (!one.has_value()) continue;
        tensors.push_back(*one);
        given->places.push_back(static_cast<int64_t>(i));
    }
    return Node::apply(at::TensorList(tensors), given);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(adq_search, library) {
    library.def("define(int[] code) -> int", define);
    library.def("apply(int program, Tensor?[] inputs, float[] numbers) -> Tensor[]", apply);
}
