// The Consul agent that the tests start; build.sh builds it.
module domi_fast/tests/consul

go 1.20

require github.com/hashicorp/consul v1.14.11

// Of its one package, which holds data of tests, the agent makes no use; not every proxy has it.
replace github.com/envoyproxy/go-control-plane/xdsmatcher => ./xdsmatcher
