module github.com/envoyproxy/go-control-plane/xdsmatcher

go 1.20
